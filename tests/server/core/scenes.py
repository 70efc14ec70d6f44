"""A scene for examples of the scheduler's machine: one line for an event and its effects."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lattice_server.core import messages
from lattice_server.core.messages import Assign, Explanation, Reason, TaskExplained, TaskReady
from lattice_server.core.model import Binding, Capacity, Failure, FailureKind, Function, Gpu, OutputRef
from lattice_server.core.runtime import ANY_RUNTIME, Runtime
from lattice_server.core.scheduling.scheduler import Scheduler
from tests.server.core.graphs import VALUE, hello, task

GIB = 1 << 30
CRASHED = Failure(FailureKind.CRASHED, "the process died")
BROKEN = Failure(FailureKind.USER_ERROR, "broken")
STOPPED = Failure(FailureKind.CANCELLED, "stopped")


class Scene:
    """One scheduler, with workers that the test controls. Every invariant is checked after every step."""

    def __init__(self, *nodes: Any, limits: dict[str, int] | None = None, is_restoring: bool = False) -> None:
        self.machine = Scheduler("e", limits=limits, is_restoring=is_restoring)
        self.now = 0.0
        self.effects: list[Any] = []
        self.leases: dict[str, Assign] = {}
        self.tell(*nodes)

    def tell(self, *events: Any, at: float | None = None) -> list[str]:
        """Let events happen, later if wanted; return the batches handed out, such as `a` or `a+b`."""
        self.now = self.now if at is None else at
        self.effects = self.machine.handle_all(events, self.now)
        self.machine.check()
        batches = [effect for effect in self.effects if isinstance(effect, Assign)]
        for assign in batches:
            self.leases.update({attempt.task_id: assign for attempt in assign.attempts})
        return ["+".join(attempt.task_id for attempt in assign.attempts) for assign in batches]

    def succeed(self, *task_ids: str, at: float | None = None, took: float = 1.0) -> list[str]:
        """Let the newest leases of these tasks succeed, all members of each."""
        leases = {id(self.leases[task_id]): self.leases[task_id] for task_id in task_ids}
        return self.tell(*[report for lease in leases.values() for report in successes(lease, took)], at=at)

    def fail(self, task_id: str, failure: Failure = BROKEN, at: float | None = None) -> list[str]:
        """Let one member of its newest lease fail."""
        lease = self.leases[task_id]
        item = [attempt.task_id for attempt in lease.attempts].index(task_id)
        return self.tell(messages.AttemptFailed(lease.session_id, lease.lease_id, item, failure), at=at)

    def start(self, *task_ids: str) -> list[str]:
        """Let the newest leases of these tasks start."""
        leases = [self.leases[task_id] for task_id in task_ids]
        return self.tell(*[messages.AttemptStarted(lease.session_id, lease.lease_id, 0) for lease in leases])

    def cancel(self, *task_ids: str) -> list[str]:
        """Cancel tasks of run `r`."""
        return self.tell(messages.CancelRequested("r", task_ids, STOPPED))

    def tick_when_due(self) -> list[str]:
        """Let time pass until something is due."""
        due = self.machine.next_deadline()
        assert due is not None, "nothing is due"
        return self.tell(at=due)

    def ends(self) -> dict[str, str]:
        """Return how tasks ended in the last step."""
        ended = messages.TaskSucceeded | messages.TaskFailed | messages.TaskCancelled
        return {e.task_id: type(e).__name__.removeprefix("Task").lower() for e in self.effects if isinstance(e, ended)}

    def explanation(self, task_id: str) -> Explanation | None:
        """Return the explanation of a task of run `r`."""
        (answer,) = self.machine.handle(messages.ExplainRequested(1, "r", task_id), self.now)
        assert isinstance(answer, TaskExplained)
        return answer.explanation

    def why(self, task_id: str) -> list[Reason]:
        """Return the reasons why a task is not running."""
        found = self.explanation(task_id)
        return [] if found is None else list(found.reasons)

    def devices(self, task_id: str) -> tuple[int, ...]:
        """Return the GPUs a task was given."""
        return self.leases[task_id].gpu_indices


def node(node_id: str = "n", cpu: float = 4.0, gpus: Sequence[int] = (), **settings: Any) -> messages.WorkerHello:
    """Return a worker's greeting; `gpus` are the GiB of memory of each device."""
    devices = tuple(Gpu(index, "model", size * GIB) for index, size in enumerate(gpus))
    return replace(hello(node_id), capacity=Capacity(cpu, 8 * GIB, devices), **settings)


def ready(
    task_id: str,
    *,
    run: str = "r",
    tenant: str = "",
    priority: int = 0,
    after: str = "",
    function: str = "sha256:sync",
    entrypoint: str = "",
    runtime: Runtime = ANY_RUNTIME,
    split: tuple[str, ...] = (),
    given: Binding | None = None,
    **settings: Any,
) -> TaskReady:
    """Return that a task is ready, with an input `given` if wanted, or will be `after` another."""
    code = Function(function, is_async=False, definition=None, entrypoint=entrypoint, runtime=runtime)
    spec = replace(task(task_id, **settings), function=code)
    inputs: dict[str, Binding] = {"x": OutputRef(after, "out")} if after else {}
    if given is not None:
        inputs["given"] = given
    return TaskReady(run, spec, inputs, priority, after, tenant, split_outputs=split)


def successes(lease: Assign, took: float = 1.0) -> list[messages.AttemptSucceeded]:
    """Return the reports of a batch that went well."""
    split = {name: [VALUE] for name in lease.split_outputs}
    items = range(len(lease.attempts))
    return [messages.AttemptSucceeded(lease.session_id, lease.lease_id, i, {"out": VALUE}, took, split) for i in items]
