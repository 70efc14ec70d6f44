"""A stage for examples of one run: one line for the events of the scheduler and the effects of the run."""

from typing import Any

from lattice_server.core.messages import TaskCancelled, TaskFailed, TaskReady, TaskStarted, TaskSucceeded
from lattice_server.core.model import Condition, Failure, FailureKind, FailurePolicy, OutputRef, TaskSpec, WorkflowSpec
from lattice_server.core.run import dag
from lattice_server.core.run.run import Run
from lattice_server.core.states import TaskState
from tests.server.core.cluster import value
from tests.server.core.graphs import SYNC, task

ANYWAY = FailurePolicy.FINISH_INDEPENDENT
BROKEN = Failure(FailureKind.USER_ERROR, "broken")
OUT = {"out": value("1")}


class RunScene:
    """One run, and the tasks that it sent last."""

    def __init__(self, *tasks: TaskSpec, policy: FailurePolicy = FailurePolicy.FAIL_FAST, **settings: Any) -> None:
        spec = WorkflowSpec(tasks, failure_policy=policy)
        self.run = Run("r", spec, dag.build(spec, ()), **settings)
        self.effects = self.take(self.run.start({}, 0.0))

    def take(self, effects: list[Any]) -> list[Any]:
        """Note the last effects of the run."""
        self.run.check()
        self.effects = effects
        return effects

    def ready(self) -> list[str]:
        """Return the tasks that were sent last, such as `a`, or `b after a`."""
        told = [(e.spec.task_id, e.after) for e in self.effects if isinstance(e, TaskReady)]
        return [f"{name} after {after}" if after else name for name, after in told]

    def inputs(self, task_id: str) -> Any:
        """Return the inputs a task was just handed over with."""
        return next(e.inputs for e in self.effects if isinstance(e, TaskReady) and e.spec.task_id == task_id)

    def succeed(self, task_id: str, items: list[str] | None = None, outputs: Any = OUT) -> list[str]:
        """Let a task succeed; `items` are the elements of its output. Return the tasks that were sent."""
        split = {} if items is None else {"out": [value(item) for item in items]}
        self.run.handle(TaskStarted("r", task_id, 1, "n", "ip", ()), 1.0)
        self.take(self.run.handle(TaskSucceeded("r", task_id, 1, outputs, split), 1.0))
        return self.ready()

    def fail(self, task_id: str) -> list[str]:
        """Let a task fail."""
        self.take(self.run.handle(TaskFailed("r", task_id, 1, BROKEN), 1.0))
        return self.ready()

    def cancelled(self, task_id: str) -> list[str]:
        """Let the scheduler say that a task was cancelled."""
        self.take(self.run.handle(TaskCancelled("r", task_id, 1, Failure(FailureKind.CANCELLED, "stopped")), 1.0))
        return self.ready()

    def states(self, state: TaskState) -> list[str]:
        """Return the tasks in a state."""
        return [task_id for task_id, record in self.run.tasks.items() if record.state is state]


def mapped(task_id: str, over: str, **settings: Any) -> TaskSpec:
    """Return a task mapped over another's output."""
    return task(task_id, [over], over=f"from_{over}", **settings)


def when(task_id: str, source: str, needs: tuple[str, ...] = (), **settings: Any) -> TaskSpec:
    """Return a task that runs when another's output is true."""
    return task(task_id, needs, condition=Condition(OutputRef(source, "out"), **settings))


def optional(task_id: str, *sources: str, **settings: Any) -> TaskSpec:
    """Return a task that can do without those it is wired to."""
    inputs = {f"from_{source}": OutputRef(source, "out", is_optional=True) for source in sources}
    return TaskSpec(task_id, SYNC, inputs=inputs, outputs=("out",), **settings)
