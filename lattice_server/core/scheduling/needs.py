"""Owns the services that tasks need. Rule: a task is queued only while all of them are ready and one node reaches all.

A task that waits for a service holds nothing. When a service changes, each unassigned task that needs it is checked
again.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lattice_server.core.messages.queries import Reason, ReasonKind
from lattice_server.core.messages.services import ServiceChanged, ServiceNeeded
from lattice_server.core.model import Failure
from lattice_server.core.scheduling.node_registry import NodeRegistry
from lattice_server.core.scheduling.work import Task
from lattice_server.core.tenancy import id_of, key_of

UNKNOWN = "there is no such service"


@dataclass(slots=True, eq=False)
class Needs:
    """The services as the scheduler knows them, and the tasks that need each."""

    _registry: NodeRegistry
    _emit: Callable[[ServiceNeeded], None]
    _services: dict[str, ServiceChanged] = field(default_factory=dict)
    _tasks: dict[str, dict[Task, None]] = field(default_factory=dict)
    waiting: dict[Task, float] = field(default_factory=dict)  # Since when.
    _changed: dict[str, None] = field(default_factory=dict)

    def add(self, task: Task) -> None:
        """Take a task that has not ended."""
        for key in _keys(task):
            self._tasks.setdefault(key, {})[task] = None
            self._changed[key] = None

    def forget(self, task: Task) -> None:
        """Forget a task that has ended."""
        self.waiting.pop(task, None)
        for key in _keys(task):
            del self._tasks[key][task]
            if not self._tasks[key]:
                del self._tasks[key]
            self._changed[key] = None

    def may_queue(self, task: Task, now: float) -> bool:
        """Whether a task may be queued; else it waits here. Its shape is that of the nodes that reach its services."""
        keys = _keys(task)
        if not keys:
            return True
        reached = self._reached(keys)
        self._changed |= dict.fromkeys(keys)
        if reached == frozenset() or not all(self._is_ready(key) for key in keys):
            self.waiting.setdefault(task, now)
            return False
        self.waiting.pop(task, None)
        task.shape = self._registry.within(task.shape, reached)
        return True

    def failure_of(self, task: Task) -> Failure | None:
        """Return why a task can never have its services; None when it may."""
        found = (self._services.get(key) for key in _keys(task))
        return next((one.failure for one in found if one is not None and one.failure is not None), None)

    def change(self, event: ServiceChanged) -> list[Task]:
        """Take the condition of a service; return the tasks to look at again."""
        if self._services.get(event.key) == event:
            return []
        if event.detail == UNKNOWN:
            self._services.pop(event.key, None)
        else:
            self._services[event.key] = event
        return [task for task in self._tasks.get(event.key, ()) if task.group is not None or task in self.waiting]

    def reasons(self, task: Task) -> tuple[Reason, ...]:
        """Return why a task waits for its services."""
        keys = _keys(task)
        found = []
        for key in keys:
            if not self._is_ready(key):
                known = self._services.get(key)
                detail = UNKNOWN if known is None else known.detail
                found.append(Reason(ReasonKind.SERVICE, f"service {id_of(key)!r} is not ready: {detail}"))
        if not found:
            names = ", ".join(map(id_of, keys))
            found.append(Reason(ReasonKind.SERVICE, f"no node reaches an instance of each of {names}"))
        return tuple(found)

    def report(self) -> None:
        """Tell how many tasks need the services of which that changed."""
        for key in self._changed:
            tasks = self._tasks.get(key, ())
            waiting = sum(task in self.waiting for task in tasks)
            self._emit(ServiceNeeded(key, waiting, len(tasks) - waiting))
        self._changed.clear()

    def check(self, live: Iterable[Task]) -> None:
        """Assert that the tables have the tasks that need services."""
        needing = {id(task) for task in live if task.ready.spec.services}
        assert needing == {id(task) for tasks in self._tasks.values() for task in tasks}
        for task in self.waiting:
            assert id(task) in needing
            assert task.group is None, "a task waits for a service and is queued"
            assert not task.lease_id
            assert self.failure_of(task) is None, "a task waits for a service that cannot start"

    def _is_ready(self, key: str) -> bool:
        found = self._services.get(key)
        return found is not None and found.is_ready

    def _reached(self, keys: Iterable[str]) -> frozenset[str] | None:
        """Return the nodes that reach all of these services; None for all nodes."""
        reached: frozenset[str] | None = None
        for key in keys:
            found = self._services.get(key)
            if found is not None and found.nodes is not None:
                reached = found.nodes if reached is None else reached & found.nodes
        return reached


def _keys(task: Task) -> list[str]:
    return [key_of(name, task.ready.tenant) for name in task.ready.spec.services]
