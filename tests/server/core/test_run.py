"""One run: progress, failure, cancellation."""

import pytest

from lattice_server.core import dag
from lattice_server.core.errors import InvalidError
from lattice_server.core.messages import (
    CancelRequested,
    RunFinished,
    TaskCancelled,
    TaskFailed,
    TaskReady,
    TaskSkipped,
    TaskStarted,
    TaskSucceeded,
)
from lattice_server.core.model import Failure, FailureKind, FailurePolicy, OutputRef, TaskSpec, WorkflowSpec
from lattice_server.core.run import Run
from lattice_server.core.states import RunState
from tests.server.core.graphs import SYNC, VALUE, task, workflow

DIAMOND = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c")}
BROKEN = Failure(FailureKind.USER_ERROR, "broken")


def run_of(spec: WorkflowSpec) -> Run:
    return Run("r", spec, dag.build(spec, ()))


def ready(effects: list[object]) -> list[str]:
    return [effect.spec.task_id for effect in effects if isinstance(effect, TaskReady)]


def succeed(run: Run, task_id: str) -> list[object]:
    run.handle(TaskStarted("r", task_id, 1, "n", "ip", ()), 1.0)
    effects = run.handle(TaskSucceeded("r", task_id, 1, {"out": VALUE}), 2.0)
    run.check()
    return list(effects)


def test_tasks_become_ready_when_their_inputs_are_there() -> None:
    run = run_of(workflow(DIAMOND))
    assert ready(list(run.start({}, 0.0))) == ["a"]
    assert ready(succeed(run, "a")) == ["b", "c"]
    assert ready(succeed(run, "c")) == []
    assert ready(succeed(run, "b")) == ["d"]
    assert succeed(run, "d")[-1] == RunFinished(RunState.SUCCEEDED, None)


def test_fail_fast_stops_what_runs_and_skips_what_waits() -> None:
    run = run_of(workflow(DIAMOND))
    run.start({}, 0.0)
    succeed(run, "a")
    run.handle(TaskStarted("r", "c", 1, "n", "ip", ()), 1.0)
    run.handle(TaskStarted("r", "b", 1, "n", "ip", ()), 1.0)
    effects = run.handle(TaskFailed("r", "b", 1, BROKEN), 2.0)
    assert [e.task_ids for e in effects if isinstance(e, CancelRequested)] == [("c",)]
    assert [e.task_id for e in effects if isinstance(e, TaskSkipped)] == ["d"]
    stopped = Failure(FailureKind.CANCELLED, "stopped")
    finished = run.handle(TaskCancelled("r", "c", 1, stopped), 3.0)[-1]
    assert isinstance(finished, RunFinished)
    assert finished.state is RunState.FAILED
    assert finished.failure is not None
    assert finished.failure.task_id == "b"
    run.check()


def test_independent_tasks_finish_when_asked_to() -> None:
    run = run_of(workflow(DIAMOND | {"alone": ()}, failure_policy=FailurePolicy.FINISH_INDEPENDENT))
    run.start({}, 0.0)
    run.handle(TaskStarted("r", "a", 1, "n", "ip", ()), 1.0)
    effects = run.handle(TaskFailed("r", "a", 1, BROKEN), 2.0)
    assert [e.task_id for e in effects if isinstance(e, TaskSkipped)] == ["b", "c", "d"] or len(effects) == 4
    assert not run.is_terminal
    assert isinstance(succeed(run, "alone")[-1], RunFinished)
    assert run.state is RunState.FAILED


def test_a_cancelled_run_starts_nothing_more() -> None:
    run = run_of(workflow(DIAMOND))
    run.start({}, 0.0)
    run.handle(TaskStarted("r", "a", 1, "n", "ip", ()), 1.0)
    assert ready(list(run.cancel("enough", 1.0))) == []
    assert ready(succeed_late(run)) == []
    assert run.state is RunState.CANCELLED


def succeed_late(run: Run) -> list[object]:
    return list(run.handle(TaskSucceeded("r", "a", 1, {"out": VALUE}), 2.0))


@pytest.mark.parametrize(
    ("tasks", "reason", "text"),
    [
        ((task("a", ("b",)), task("b", ("a",))), "WORKFLOW_CYCLE", "a -> b -> a"),
        ((task("a"), task("a")), "INVALID_WORKFLOW", "used twice"),
        ((task("a", ("ghost",)),), "INVALID_WORKFLOW", "no task 'ghost'"),
        (
            (task("a"), TaskSpec("b", SYNC, inputs={"x": OutputRef("a", "nope")})),
            "INVALID_WORKFLOW",
            "task 'a' has no output 'nope'; its outputs: out",
        ),
    ],
)
def test_a_broken_graph_is_refused_by_name(tasks: tuple[TaskSpec, ...], reason: str, text: str) -> None:
    with pytest.raises(InvalidError, match=text if "->" not in text else "cycle") as caught:
        dag.build(WorkflowSpec(tasks))
    assert caught.value.reason == reason
