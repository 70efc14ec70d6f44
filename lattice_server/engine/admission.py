"""Owns what is let in. Rule: what is let in is never lost; what cannot be kept, or never run, is refused at once."""

import asyncio
from collections import Counter
from collections.abc import Sequence

from lattice_server.core.errors import ExhaustedError, PreconditionError
from lattice_server.core.model import NodeSpec, TaskSpec
from lattice_server.core.run.run import Bounds
from lattice_server.core.scheduling.placement import Shape, shape_of
from lattice_server.core.scheduling.shortages import impossibility
from lattice_server.core.steps import Steps, finish, stepwise

RETRY_AFTER_S = 1.0
# A tenth of the open tasks is for runs of at most so many, so that large runs do not keep small ones out.
SMALL_RUN_TASKS = 1000
# While others fill the queue a tenant still gets this part of it, and the queue grows to twice its length at most.
TENANT_PART = 16


class Admission:
    """Counts open tasks and knows the nodes; lives on the main thread."""

    def __init__(self, bounds: Bounds, max_open_tasks: int) -> None:
        self.bounds = bounds
        self._nodes: tuple[NodeSpec, ...] = ()
        self._has_nodes = asyncio.Event()
        self._max_open_tasks = max_open_tasks
        self._open_tasks: Counter[str] = Counter()
        self._total = 0

    def know(self, nodes: tuple[NodeSpec, ...]) -> None:
        """Take the nodes there are, as they are when nothing runs on them."""
        self._nodes = nodes
        if nodes:
            self._has_nodes.set()

    async def has_nodes(self) -> None:
        """Wait for the first node: before it is there, nobody can tell what could never run."""
        await self._has_nodes.wait()

    def count(self, change: int, tenant: str = "") -> None:
        """Note that tasks of a tenant opened or, when negative, ended."""
        self._total += change
        self._open_tasks[tenant] += change
        if not self._open_tasks[tenant]:
            del self._open_tasks[tenant]

    def check_room(self, count: int, tenant: str = "") -> None:
        """Let so many tasks of a tenant in.

        Raises:
            ExhaustedError: RUN_TOO_LARGE, or QUEUE_FULL when it is worth asking again.
        """
        if count > self.bounds.max_tasks:
            raise ExhaustedError("RUN_TOO_LARGE", f"a run may have at most {self.bounds.max_tasks} tasks")
        if self._total and not self._has_room(count, tenant):
            # How much of it is other tenants' is not said.
            text = f"{self._open_tasks[tenant]} tasks are open, {count} more are over what is left of the limit of"
            raise ExhaustedError("QUEUE_FULL", f"{text} {self._max_open_tasks}", retry_after_s=RETRY_AFTER_S)

    def _has_room(self, more: int, tenant: str) -> bool:
        most = self._max_open_tasks
        if self._total + more <= (most if more <= SMALL_RUN_TASKS else most * 9 // 10):
            return True
        return self._open_tasks[tenant] + more <= most // TENANT_PART and self._total + more <= 2 * most

    def check_possible(self, tasks: Sequence[TaskSpec]) -> None:
        """Raise PreconditionError, UNSATISFIABLE_RESOURCES, when no node could ever run one of these tasks."""
        finish(self.checking(tasks))

    def checking(self, tasks: Sequence[TaskSpec]) -> Steps[None]:
        """As `check_possible`, in steps."""
        possible: set[Shape] = set()
        for (index, task), is_step in stepwise(enumerate(tasks)):
            if is_step:
                yield
            shape = shape_of(task)
            if shape in possible:
                continue
            if why := impossibility(shape, self._nodes):
                text = f"no node could ever run tasks[{index}], {task.task_id!r}: {why}"
                raise PreconditionError("UNSATISFIABLE_RESOURCES", text, metadata={"task_id": task.task_id})
            possible.add(shape)
