"""Owns the leases whose attempts wait, for tasks that they called or for signals. Such a lease is parked: it has given
its CPUs back.

Rules: a lease is parked while its attempt waits for anything, and is told of the last one when it has its CPUs again.
A node that owes CPUs to a parked lease takes no new lease. A call whose task could never start beside the GPUs, the
memory and the permits of parked leases fails, so that leases never wait for each other in a circle.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from lattice_server.core.frozen import frozen
from lattice_server.core.messages import AnswerQuestion, AttemptAwaits, CallEnded, CallResult
from lattice_server.core.model import Failure, FailureKind
from lattice_server.core.scheduling.lease_table import Lease
from lattice_server.core.scheduling.node_registry import NodeRegistry
from lattice_server.core.scheduling.nodes import Node
from lattice_server.core.scheduling.placement import devices_on
from lattice_server.core.scheduling.placer import Placer
from lattice_server.core.scheduling.work import Task

Key = tuple[str, str]


@frozen
class Wait:
    """A wait since `since`, in monotonic seconds: for the end of a task, or for a signal. No task has the id ""."""

    key: Key
    signal: str
    since: float


@dataclass(slots=True, eq=False)
class Waits:
    """The parked leases, the tasks that they wait for, and the answers that wait for CPUs, in order of arrival."""

    _registry: NodeRegistry
    _placer: Placer
    _tasks: Mapping[Key, Task]
    _emit: Callable[[AnswerQuestion], None]
    _refuse: Callable[[Task, Failure, float], None]
    _open: dict[str, dict[int, Wait]] = field(default_factory=dict)
    _parked: dict[str, dict[str, Lease]] = field(default_factory=lambda: defaultdict(dict))  # By node.
    _answers: dict[str, tuple[int, CallResult]] = field(default_factory=dict)  # By lease.
    _is_due: bool = False

    def begin(self, lease: Lease, event: AttemptAwaits, run_id: str, now: float) -> None:
        """Park a lease, unless it is, because its attempt waits for a task or a signal."""
        waits = self._open.setdefault(lease.lease_id, {})
        key = (run_id, event.called_id if event.signal is None else "")
        waits[event.number] = Wait(key, "" if event.signal is None else event.signal.name, now)
        if not lease.slot.is_parked:
            self._placer.pipeline.vacate_slot(lease.slot)
            self._registry.park(lease.slot)
            self._placer.note_change()
        self._parked[lease.slot.node_id][lease.lease_id] = lease
        if (held := self._answers.pop(lease.lease_id, None)) is not None:
            self._answer(lease, *held)  # It waits for another one anyway.
        self._is_due = True

    def end(self, event: CallEnded) -> None:
        """Take the end of a wait; its attempt is told now, or when the lease has its CPUs again."""
        lease = self._placer.table.leases.get(event.lease_id)
        waits = self._open.get(event.lease_id, {})
        if lease is None or waits.pop(event.number, None) is None:
            return
        if waits:
            self._answer(lease, event.number, event.result)
        else:
            self._answers[lease.lease_id] = event.number, event.result

    def note_change(self) -> None:
        """Note a change after which leases may wait in a circle."""
        self._is_due = True

    def refuse_stuck(self, now: float) -> None:
        """Fail the calls whose tasks are queued and can never start, because parked leases wait in a circle."""
        if not (self._is_due and self._open):
            return
        self._is_due = False
        keys = dict.fromkeys(wait.key for waits in self._open.values() for wait in waits.values())
        for key in reversed(keys):  # The newest first: it failed last to see that there is no room.
            task = self._tasks.get(key)
            if task is None or task.group is None or not _may_lack(task) or self._fits(task, self._all()):
                continue
            stuck = self._stuck()
            if any(wait.key == key for lease_id in stuck for wait in self._open[lease_id].values()):
                reason = self._reason(task, stuck.values())
                self._refuse(task, Failure(FailureKind.NESTED_RESOURCES, reason), now)

    def resume(self) -> None:
        """Give parked leases that need not wait any more their CPUs back, where these are free."""
        owing = set()
        for lease_id in list(self._answers):
            lease = self._placer.table.leases[lease_id]
            node = self._registry.nodes[lease.slot.node_id]
            if node.node_id in owing or not node.has_room_for(lease.slot):
                owing.add(node.node_id)
                continue
            self._unpark(lease)
            self._answer(lease, *self._answers.pop(lease_id))
        for node in self._registry.nodes.values():
            if node.owes_cpu != (node.node_id in owing):
                node.owes_cpu = not node.owes_cpu
                self._placer.note_change()

    def of(self, lease_id: str) -> list[Wait]:
        """Return the open waits of the attempt of a lease."""
        return list(self._open.get(lease_id, {}).values())

    def forget(self, lease: Lease) -> None:
        """Forget a lease that is being released."""
        self._open.pop(lease.lease_id, None)
        self._answers.pop(lease.lease_id, None)
        self._parked[lease.slot.node_id].pop(lease.lease_id, None)

    def check(self) -> None:
        """Assert that parked leases wait, and that no lease waits for CPUs that are free."""
        leases = self._placer.table.leases
        parked = {lease.lease_id for lease in self._all()}
        assert parked == {lease_id for lease_id, waits in self._open.items() if waits} | self._answers.keys()
        assert all(leases[lease_id].slot.is_parked for lease_id in parked)
        assert not self._open.keys() - leases.keys()
        first: dict[str, str] = {}
        for lease_id in self._answers:
            first.setdefault(leases[lease_id].slot.node_id, lease_id)
        for node_id, lease_id in first.items():
            node = self._registry.nodes[node_id]
            assert node.owes_cpu
            assert not node.has_room_for(leases[lease_id].slot)

    def _answer(self, lease: Lease, number: int, result: CallResult) -> None:
        session_id = self._registry.nodes[lease.slot.node_id].session_id
        self._emit(AnswerQuestion(session_id, lease.lease_id, number, result))

    def _unpark(self, lease: Lease) -> None:
        self._registry.unpark(lease.slot)
        del self._parked[lease.slot.node_id][lease.lease_id]

    def _all(self) -> list[Lease]:
        return [lease for leases in self._parked.values() for lease in leases.values()]

    def _stuck(self) -> dict[str, Lease]:
        """Return the parked leases that wait in a circle: none of them ends before another one does."""
        left = {lease.lease_id: lease for lease in self._all() if self._open.get(lease.lease_id)}
        while True:
            free = [lease for lease in left.values() if self._can_resume(lease, left)]
            if not free:
                return left
            for lease in free:
                del left[lease.lease_id]

    def _can_resume(self, lease: Lease, left: Mapping[str, Lease]) -> bool:
        """Whether all tasks that a lease waits for can end while the leases `left` stay parked."""
        for wait in self._open[lease.lease_id].values():
            task = self._tasks.get(wait.key)
            if task is None:
                continue  # It has ended, or is not sent yet; or a caller will send the signal.
            if task.lease_id in left or (task.group is not None and not self._fits(task, left.values())):
                return False
        return True

    def _fits(self, task: Task, parked: Iterable[Lease]) -> bool:
        """Whether a task could start on some node if nothing but parked leases were there."""
        parked = list(parked)
        if not parked:
            return True
        if (key := task.concurrency) is not None and (limit := self._placer.permits.limit(key)) is not None:
            keys = [lease.slot.concurrency.key for lease in parked if lease.slot.concurrency is not None]
            if keys.count(key.key) >= limit:
                return False
        suited = [node for node in self._registry.nodes.values() if self._registry.could_run(task.shape, node)]
        return not suited or any(devices_on(_only(node, parked), task.shape) is not None for node in suited)

    def _reason(self, task: Task, stuck: Iterable[Lease]) -> str:
        stuck = list(stuck)
        wanted = task.shape.resources
        found: list[tuple[str, list[Lease]]] = []
        for name in ("gpu", "gpu_memory_bytes", "memory_bytes"):
            holders = [lease for lease in stuck if getattr(lease.slot.resources, name)]
            if holders and getattr(wanted, name):
                found.append((name, holders))
        what, holders = found[0] if found else ("a permit", stuck)
        names = ", ".join(repr(holder.tasks[0].ready.spec.task_id) for holder in holders[:3])
        text = f"the called task {task.ready.spec.task_id!r} can never start: {what} that it needs is held by {names}"
        return f"{text}, which wait for called tasks; only CPUs are given back meanwhile"


def _may_lack(task: Task) -> bool:
    """Whether a task needs GPUs, memory or a permit, which parked leases do not release."""
    wanted = task.shape.resources
    return bool(wanted.gpu or wanted.gpu_memory_bytes or wanted.memory_bytes or task.concurrency)


def _only(node: Node, parked: Iterable[Lease]) -> Node:
    """Return a node as if only these parked leases were there."""
    found = Node(node.spec, node.session_id)
    for lease in parked:
        if lease.slot.node_id == node.node_id:
            found.take(lease.slot)
    return found
