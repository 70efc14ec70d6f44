"""One run: progress, failure, cancellation."""

from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_server.core.errors import InvalidError
from lattice_server.core.messages import (
    CancelRequested,
    RunFinished,
    TaskCancelled,
    TaskFailed,
    TaskReady,
    TaskReturned,
    TaskSkipped,
    TaskStarted,
    TaskSucceeded,
)
from lattice_server.core.model import Failure, FailureKind, FailurePolicy, OutputRef, TaskSpec, WorkflowSpec
from lattice_server.core.run import dag
from lattice_server.core.run.ordering import least_left_aged
from lattice_server.core.run.run import Run
from lattice_server.core.states import RunState
from tests.server.core.graphs import SYNC, VALUE, task, workflow

DIAMOND = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c")}
BROKEN = Failure(FailureKind.USER_ERROR, "broken")


def run_of(spec: WorkflowSpec) -> Run:
    return Run("r", spec, dag.build(spec, ()))


def ready(effects: list[object]) -> list[str]:
    """The tasks handed over, each with the one it still waits for."""
    named = [(e.spec.task_id, e.after) for e in effects if isinstance(e, TaskReady)]
    return [f"{task_id} after {after}" if after else task_id for task_id, after in named]


def succeed(run: Run, task_id: str) -> list[object]:
    run.handle(TaskStarted("r", task_id, 1, "n", "ip", ()), 1.0)
    effects = run.handle(TaskSucceeded("r", task_id, 1, {"out": VALUE}), 2.0)
    run.check()
    return list(effects)


def test_tasks_are_handed_over_once_they_wait_for_one_other_at_most() -> None:
    run = run_of(workflow(DIAMOND))
    assert ready(list(run.start({}, 0.0))) == ["a", "b after a", "c after a"]
    assert ready(succeed(run, "a")) == []
    assert ready(succeed(run, "c")) == ["d after b"]
    assert ready(succeed(run, "b")) == []
    assert succeed(run, "d")[-1] == RunFinished(RunState.SUCCEEDED, None)


def test_chain_is_sent_as_a_whole_with_its_known_inputs() -> None:
    run = run_of(workflow({"a": (), "b": ("a",), "c": ("b",)}))
    effects = list(run.start({}, 0.0))
    assert ready(effects) == ["a", "b after a", "c after b"]
    assert [e.inputs for e in effects if isinstance(e, TaskReady)][1] == {"from_a": OutputRef("a", "out")}


def test_a_task_handed_back_is_handed_over_with_its_inputs() -> None:
    run = run_of(workflow({"a": (), "b": ("a",)}))
    run.start({}, 0.0)
    succeed(run, "a")
    (again,) = run.handle(TaskReturned("r", "b"), 3.0)
    assert again == TaskReady(
        "r", run.tasks["b"].spec, {"from_a": VALUE}, 0, rank=least_left_aged(run.started_at, run.open_tasks, "b")
    )


def test_a_task_handed_back_after_its_cancellation_ends_cancelled() -> None:
    run = run_of(workflow({"a": (), "b": ("a",), "c": ()}, failure_policy=FailurePolicy.FINISH_INDEPENDENT))
    run.start({}, 0.0)
    succeed(run, "a")
    assert [e.task_ids for e in run.cancel_task("b", "no", 2.5) if isinstance(e, CancelRequested)] == [("b",)]
    assert any(isinstance(e, TaskCancelled) for e in run.handle(TaskReturned("r", "b"), 3.0))
    run.check()


def test_fail_fast_cancels_running_tasks_and_skips_blocked_ones() -> None:
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


@given(st.dictionaries(st.sampled_from("abcdefg"), st.lists(st.sampled_from("abcdefg"), unique=True)))
def test_a_graph_is_refused_with_a_cycle_of_its_edges_exactly_when_it_has_one(drawn: dict[str, list[str]]) -> None:
    sources = {name: drawn.get(name, []) for name in "abcdefg"}
    try:
        TopologicalSorter(sources).prepare()
    except CycleError:
        with pytest.raises(InvalidError) as caught:
            dag.build(WorkflowSpec(tuple(task(name, tuple(names)) for name, names in sources.items())))
        first, *path = caught.value.metadata["cycle"].split(" -> ")
        assert path[-1] == first
        assert len({*path}) == len(path)
        assert all(source in sources[target] for source, target in pairwise([first, *path]))
    else:
        built = dag.build(WorkflowSpec(tuple(task(name, tuple(names)) for name, names in sources.items())))
        edges = {(source, target) for source, targets in built.successors.items() for target in targets}
        assert edges == {(source, target) for target, names in sources.items() for source in names}
        assert {target: [*names] for target, names in built.predecessors.items()} == sources
