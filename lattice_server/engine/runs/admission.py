"""Owns the admission of work. Rule: admitted work is never dropped for lack of space in the queue; work that exceeds a
limit, or that no node could run, is refused at once."""

import asyncio
from collections import Counter
from collections.abc import Sequence

from lattice_server.core.errors import ExhaustedError, PreconditionError
from lattice_server.core.model import NodeSpec, TaskSpec
from lattice_server.core.run.run import Bounds
from lattice_server.core.scheduling.placement import Shape, shape_of
from lattice_server.core.scheduling.shortages import impossibility
from lattice_server.core.steps import Steps, finish, stepwise
from lattice_server.engine.stores.usage import Bound, Usage

GIB = 1024 * 1024 * 1024
LIVE_BOUND = Bound(8 * GIB, share=0.5)
RETRY_AFTER_S = 1.0
# A tenth of the open tasks is reserved for runs of at most this many tasks, so that large runs do not block small ones.
SMALL_RUN_TASKS = 1000
# While other tenants fill the queue, a tenant may still have this part of it; the queue is then at most twice as long.
TENANT_PART = 16


class Admission:
    """Counts open tasks and the memory of live runs, and knows the nodes; lives on the main thread."""

    def __init__(self, bounds: Bounds, max_open_tasks: int, live_bound: Bound = LIVE_BOUND) -> None:
        self.bounds = bounds
        self.memory = Usage("live runs", live_bound)
        self._nodes: tuple[NodeSpec, ...] = ()
        self._has_nodes = asyncio.Event()
        self._max_open_tasks = max_open_tasks
        self._open_tasks: Counter[str] = Counter()
        self._total = 0

    @property
    def open_tasks(self) -> int:
        """How many tasks of all tenants have not ended."""
        return self._total

    def know(self, nodes: tuple[NodeSpec, ...]) -> None:
        """Replace the nodes; each is described with its full capacity."""
        self._nodes = nodes
        if nodes:
            self._has_nodes.set()

    async def has_nodes(self) -> None:
        """Wait for the first node; without one, no task could be checked against capacity."""
        await self._has_nodes.wait()

    def count(self, tasks: int, size_bytes: int, tenant: str) -> None:
        """Add open tasks and memory of a tenant's live runs; negative numbers subtract."""
        self.memory.add(tenant, size_bytes)
        self._total += tasks
        self._open_tasks[tenant] += tasks
        if not self._open_tasks[tenant]:
            del self._open_tasks[tenant]

    def check_room(self, tasks: int, size_bytes: int, tenant: str) -> None:
        """Check that so many tasks of a tenant, which take so much memory, may be admitted.

        Raises:
            ExhaustedError: RUN_TOO_LARGE; QUEUE_FULL or STORE_FULL when the caller may try again.
        """
        if tasks > self.bounds.max_tasks:
            raise ExhaustedError("RUN_TOO_LARGE", f"a run may have at most {self.bounds.max_tasks} tasks")
        if self._total and not self._has_room(tasks, tenant):
            # The message counts the tenant's own tasks only, because other tenants' numbers are not its business.
            text = f"{self._open_tasks[tenant]} tasks are open, {tasks} more are over what is left of the limit of"
            raise ExhaustedError("QUEUE_FULL", f"{text} {self._max_open_tasks}", retry_after_s=RETRY_AFTER_S)
        self.check_memory(size_bytes, tenant)

    def check_memory(self, size_bytes: int, tenant: str) -> None:
        """Raise ExhaustedError, STORE_FULL, when the live runs of a tenant may not take so much more memory."""
        if (refusal := self.memory.refusal(tenant, size_bytes)) is not None:
            refusal.retry_after_s = RETRY_AFTER_S if self.memory.total else None
            raise refusal

    def excess(self, tenant: str) -> str:
        """Return why a live run of a tenant may not grow any more; empty when it may.

        A tenant over its own limit may not grow. When all tenants together are over the whole limit, the tenant with
        the most memory may not.
        """
        is_over = self.memory.is_over(tenant) or (self.memory.is_full() and self.memory.has_most(tenant))
        refusal = self.memory.refusal(tenant, 0) if is_over else None
        return "" if refusal is None else refusal.message

    def _has_room(self, more: int, tenant: str) -> bool:
        most = self._max_open_tasks
        if self._total + more <= (most if more <= SMALL_RUN_TASKS else most * 9 // 10):
            return True
        return self._open_tasks[tenant] + more <= most // TENANT_PART and self._total + more <= 2 * most

    def check_possible(self, tasks: Sequence[TaskSpec]) -> None:
        """Raise PreconditionError, UNSATISFIABLE_RESOURCES, when no node could ever run one of these tasks."""
        finish(self.checking(tasks))

    def checking(self, tasks: Sequence[TaskSpec]) -> Steps[None]:
        """Check as `check_possible` does, in steps."""
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
