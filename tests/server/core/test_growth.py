"""Running runs that grow: tasks added by callers and spawned by tasks."""

import pytest

from lattice_server.core.errors import ExhaustedError, InvalidError, PreconditionError
from lattice_server.core.messages import (
    CancelRequested,
    TaskReady,
    TaskReturned,
    TasksAdded,
    TaskSkipped,
    TaskStarted,
    TaskSucceeded,
)
from lattice_server.core.model import (
    FailureKind,
    FailurePolicy,
    OutputRef,
    TaskSpec,
)
from lattice_server.core.run.limits import Bounds
from lattice_server.core.states import RunState, TaskState
from tests.server.core.cluster import value
from tests.server.core.graphs import SYNC, task
from tests.server.core.run_scenes import ANYWAY, OUT, RunScene, mapped, optional, when


def test_tasks_can_be_added_while_the_run_goes_on() -> None:
    story = RunScene(task("a"), task("b"))
    story.succeed("a")
    story.take(story.run.append([task("d", ["c"]), task("c", ["a", "b"])], 2.0))
    assert story.effects[0] == TasksAdded(("d", "c"), "", 2)
    assert story.ready() == ["c after b", "d after c"]


def test_added_task_gets_the_state_it_would_have_from_the_start() -> None:
    story = RunScene(task("a"), when("skipped", "a"), task("z"), task("open"), policy=ANYWAY)
    story.succeed("a", outputs={"out": value("0")})
    story.fail("z")
    story.take(
        story.run.append(
            [task("b", ["skipped"]), task("c", ["b"]), task("d", ["z"]), task("e", ["d"]), optional("f", "e", "b")], 2.0
        )
    )
    assert story.states(TaskState.SKIPPED) == ["skipped", "b", "c", "d", "e"]
    assert story.ready() == ["f"]
    reasons = {e.task_id: e.failure and e.failure.message for e in story.effects if isinstance(e, TaskSkipped)}
    assert reasons == {"b": None, "c": None, "d": "task 'z' did not succeed", "e": "task 'z' did not succeed"}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_added_task_waits_for_its_other_inputs_when_one_ends_at_once(order: tuple[int, int]) -> None:
    story = RunScene(task("a"), mapped("m", "a"), task("open"))
    story.succeed("a", [])
    added = [mapped("n", "m"), task("x", ["n", "open"])]
    story.take(story.run.append([added[index] for index in order], 2.0))
    assert story.ready() == ["x after open"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_added_task_waits_for_its_other_inputs_when_one_is_skipped_at_once(order: tuple[int, int]) -> None:
    story = RunScene(task("a"), when("no", "a"), task("open"))
    story.succeed("a", outputs={"out": value("0")})
    inputs = {"n": OutputRef("n", "out", True), "open": OutputRef("open", "out")}
    added = [task("n", ["no"]), TaskSpec("x", SYNC, inputs=inputs, outputs=("out",))]
    story.take(story.run.append([added[index] for index in order], 2.0))
    assert story.ready() == ["x after open"]


@pytest.mark.parametrize("promised", [False, True])
def test_a_list_whose_task_was_handed_out_cannot_be_mapped_over_later(promised: bool) -> None:
    story = RunScene(task("a"), task("b", ["a"]))
    with pytest.raises(InvalidError, match="handed out"):
        story.run.append([mapped("m", "b" if promised else "a")], 1.0)
    story.run.check()


def test_a_list_whose_task_still_waits_can_be_mapped_over_later() -> None:
    story = RunScene(task("a"), task("b"), task("c", ["a", "b"]))
    story.take(story.run.append([mapped("m", "c")], 1.0))
    story.succeed("a")
    assert [e.split_outputs for e in story.effects if isinstance(e, TaskReady)] == [("out",)]


def test_nothing_can_be_added_to_a_run_that_ended_or_beyond_its_bounds() -> None:
    story = RunScene(task("a"), bounds=Bounds(max_tasks=2))
    with pytest.raises(ExhaustedError, match="at most 2 tasks"):
        story.run.append([task("b"), task("c")], 1.0)
    story.succeed("a")
    with pytest.raises(PreconditionError, match="nothing can be added"):
        story.run.append([task("b")], 2.0)


def test_a_task_may_spawn_others_and_a_retry_does_not_spawn_them_again() -> None:
    story = RunScene(task("a"))
    story.run.handle(TaskStarted("r", "a", 1, "n", "ip", ()), 1.0)
    story.take(story.run.spawn("a", [task("a/0", ["a"]), task("a/1")], 1.0))
    assert story.ready() == ["a/0 after a", "a/1"]
    story.take(story.run.spawn("a", [task("a/0", ["a"]), task("a/1")], 1.0))
    assert story.effects == []
    assert story.run.tasks["a/1"].depth == 1


def test_task_fails_when_it_spawns_a_task_with_a_used_id() -> None:
    story = RunScene(task("a"), task("b"))
    story.take(story.run.spawn("a", [task("b")], 1.0))
    (cancel,) = [e for e in story.effects if isinstance(e, CancelRequested)]
    assert (cancel.task_ids, cancel.failure.kind) == (("a",), FailureKind.PAYLOAD)


def test_spawning_is_bounded_in_depth() -> None:
    story = RunScene(task("a"), bounds=Bounds(max_depth=2))
    story.run.spawn("a", [task("b")], 1.0)
    story.run.spawn("b", [task("c")], 1.0)
    story.take(story.run.spawn("c", [task("d")], 1.0))
    assert [e.failure.kind for e in story.effects if isinstance(e, CancelRequested)] == [FailureKind.RESOURCES]


@pytest.mark.parametrize("policy", list(FailurePolicy))
def test_task_fails_when_its_spawn_is_refused_after_its_success(policy: FailurePolicy) -> None:
    story = RunScene(task("a"), task("b", ["a"]), task("c", ["b"]), policy=policy, bounds=Bounds(max_tasks=3))
    story.run.handle(TaskStarted("r", "a", 1, "n", "ip", ()), 1.0)
    story.take(story.run.spawn("a", [task("d")], 1.0))
    story.take(story.run.handle(TaskSucceeded("r", "a", 1, OUT), 1.0))
    assert story.states(TaskState.FAILED) == ["a"]
    assert story.states(TaskState.SKIPPED) == ["b", "c"]
    assert [e.task_ids for e in story.effects if isinstance(e, CancelRequested)] == [("b", "c")], (
        "nothing of it goes on"
    )
    assert story.run.state is RunState.FAILED


def test_a_task_of_a_run_that_stops_spawns_nothing() -> None:
    story = RunScene(task("a"))
    story.run.cancel("enough", 1.0)
    story.take(story.run.spawn("a", [task("b")], 1.0))
    assert (list(story.run.tasks), story.effects) == (["a"], [])


def test_returned_task_is_sent_again() -> None:
    story = RunScene(task("a"), task("b", ["a"]))
    story.succeed("a")
    story.take(story.run.handle(TaskReturned("r", "b"), 2.0))
    assert story.ready() == ["b"]
