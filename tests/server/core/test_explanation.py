"""Explanations why a task waits."""

from hypothesis import given, settings
from hypothesis import strategies as st

from lattice_server.core.messages import DrainRequested, ReasonKind, WorkerDetached
from lattice_server.core.model import BatchPolicy, Condition, OutputRef, Resources, RetryPolicy
from lattice_server.core.scheduling.explain import MAX_AHEAD
from lattice_server.core.states import TaskState
from tests.server.core.cluster import value
from tests.server.core.graphs import task
from tests.server.core.run_scenes import RunScene, mapped, when
from tests.server.core.scenes import Scene, node, ready


def told(scene: Scene, task_id: str) -> list[tuple[ReasonKind, str]]:
    return [(reason.kind, reason.message) for reason in scene.why(task_id)]


def test_there_is_no_node() -> None:
    scene = Scene()
    scene.tell(ready("a"))
    assert told(scene, "a") == [(ReasonKind.NODES, "no node is connected")]


def test_explanation_names_resources_when_no_node_has_enough_free() -> None:
    scene = Scene(node("n", cpu=4), node("m", cpu=2))
    scene.tell(ready("a", resources=Resources(3.0)))
    scene.tell(ready("b", resources=Resources(4.0)))
    reasons = [(r.node_id, r.resource, r.wanted, r.free) for r in scene.why("b")]
    assert reasons == [("n", "cpu", 4.0, 1.0), ("m", "cpu", 4.0, 2.0)]
    assert told(scene, "b")[0] == (ReasonKind.RESOURCES, "node 'n': cpu: 4 wanted, 1 free")


def test_nodes_are_unsuited_or_take_nothing() -> None:
    away = node("away", labels={"zone": "a"})
    scene = Scene(node("other", labels={"zone": "b"}), node("bare"), away, node("leaving", labels={"zone": "a"}))
    scene.tell(ready("x", node_selector=(("zone", "a"),)), ready("y", node_selector=(("zone", "a"),)))
    scene.tell(WorkerDetached(scene.machine.nodes["away"].session_id), DrainRequested("leaving"))
    scene.tell(ready("z", node_selector=(("zone", "a"),)))
    assert [message for _, message in told(scene, "z")] == [
        "node 'other': its label zone is 'b', not 'a'",
        "node 'bare': it has no label zone, and 'a' is wanted",
        "node 'away': its worker is not connected",
        "node 'leaving': it is being drained",
    ]


def test_others_of_its_kind_go_first() -> None:
    scene = Scene(node(cpu=1))
    scene.tell(*[ready(name) for name in "abcd"])
    assert (ReasonKind.TURN, "2 tasks of its kind go first") in told(scene, "d")


def test_other_callers_had_less() -> None:
    scene = Scene(node(cpu=1))
    scene.tell(ready("a", tenant="x"))
    scene.tell(ready("b", tenant="x"), ready("c", tenant="y"), at=5.0)
    text = "tenants that had less of the cluster go first: 1"
    assert (ReasonKind.TURN, text) in told(scene, "b")
    assert all(kind is ReasonKind.RESOURCES for kind, _ in told(scene, "c"))


def test_its_batch_waits_for_more() -> None:
    scene = Scene(node())
    scene.tell(*[ready(name, batch=BatchPolicy(4, 2.0)) for name in "ab"])
    scene.tell(at=0.5)
    assert told(scene, "b") == [(ReasonKind.BATCH, "its batch has 2 of 4 tasks and leaves in 1.5 s")]


def test_those_of_its_own_batch_do_not_go_first() -> None:
    scene = Scene(node(cpu=1))
    scene.tell(ready("long"))
    scene.tell(*[ready(name, batch=BatchPolicy(2)) for name in "abcd"])
    assert not any(kind is ReasonKind.TURN for kind, _ in told(scene, "b"))
    assert (ReasonKind.TURN, "2 tasks of its kind go first") in told(scene, "d")


def test_a_limit_is_reached() -> None:
    scene = Scene(node())
    scene.tell(*[ready(name, concurrency_key="db", max_parallel=1) for name in "ab"])
    assert told(scene, "b") == [(ReasonKind.LIMIT, "1 calls of 'db' run, the limit is 1")]


def test_a_limit_is_kept_for_one_that_allows_fewer() -> None:
    scene = Scene(node())
    scene.tell(ready("a", concurrency_key="db", max_parallel=3))
    scene.tell(ready("alone", concurrency_key="db", max_parallel=1), ready("b", concurrency_key="db", max_parallel=3))
    text = "a call of 'db' that allows fewer of them goes first"
    assert told(scene, "b") == [(ReasonKind.LIMIT, text)]


def test_it_failed_and_waits_to_be_tried_again() -> None:
    scene = Scene(node())
    scene.tell(ready("a", retry=RetryPolicy(max_attempts=2, initial_backoff_s=10.0)))
    scene.fail("a")
    ((kind, message),) = told(scene, "a")
    assert kind is ReasonKind.RETRY
    assert message.startswith("attempt 1 failed; the next one may start in ")


def test_it_waits_for_another_task() -> None:
    scene = Scene(node())
    scene.tell(ready("a"), ready("b", after="a"))
    assert told(scene, "b") == [(ReasonKind.INPUT, "it waits for task 'a'")]


def test_explanation_names_the_leases_ahead_when_the_task_was_sent_ahead() -> None:
    scene = Scene(node(cpu=1))
    scene.tell(ready("warm"))
    scene.succeed("warm", at=0.001, took=0.001)
    scene.tell(ready("a"), ready("b", after="a"))
    scene.tell(ready("c"))
    assert told(scene, "b") == [
        (ReasonKind.INPUT, "it was sent to node 'n' along with task 'a', which it waits for"),
    ]
    assert told(scene, "c") == [(ReasonKind.TURN, "it was sent to node 'n', behind 2 short ones")]
    assert told(scene, "a") == [
        (ReasonKind.RUNNING, "it was sent to node 'n', which has not said that it started"),
    ]


def test_a_node_is_kept_for_a_larger_one() -> None:
    scene = Scene(node(cpu=2))
    scene.tell(ready("a"), ready("b"))
    scene.tell(ready("big", resources=Resources(2.0)))
    scene.succeed("a", at=0.5)
    scene.tell(ready("c"), at=1.5)
    scene.succeed("b", at=2.5)
    scene.tell(ready("d"))
    text = "node 'n' gathers resources for a larger task that waited longer"
    assert (ReasonKind.TURN, text) in told(scene, "d")


def test_it_runs_or_is_being_stopped() -> None:
    scene = Scene(node())
    scene.tell(ready("a"))
    scene.start("a")
    assert told(scene, "a") == [(ReasonKind.RUNNING, "attempt 1 runs on node 'n'")]
    scene.cancel("a")
    assert told(scene, "a") == [(ReasonKind.RUNNING, "it is being stopped on node 'n': stopped")]


def test_how_long_it_has_been_so_and_how_much_longer_it_may_be() -> None:
    scene = Scene(node(cpu=1))
    scene.tell(ready("a"))
    scene.succeed("a", at=4.0, took=4.0)
    scene.tell(*[ready(name) for name in "bcd"], at=10.0)
    scene.start("b")
    scene.tell(at=11.0)
    found = {name: scene.explanation(name) for name in "bd"}
    assert [(f.waited_s, f.start_in_s) for f in found.values() if f] == [(1.0, 0.0), (1.0, 8.0)]


def test_explanation_is_none_when_the_scheduler_does_not_have_the_task() -> None:
    assert told(Scene(), "nobody") == []


def test_run_explains_blocked_and_ended_tasks() -> None:
    story = RunScene(task("a"), task("b"), task("c", ["a", "b"]), when("d", "a"), mapped("m", "a"))
    assert [r.message for r in story.run.explain("c", 1.0).reasons] == ["task 'a' is queued", "task 'b' is queued"]
    story.succeed("a", ["1", "2"], outputs={"out": value("0")})
    assert [r.message for r in story.run.explain("m", 1.0).reasons] == ["2 of its 2 items have not ended"]
    messages = {name: story.run.explain(name, 1.0).reasons[0].message for name in "ad"}
    assert messages == {
        "a": "it has succeeded",
        "d": "it was skipped: a condition, its own or that of a task it needs, was not met",
    }
    story.fail("b")
    assert story.run.explain("b", 1.0).reasons[0].message == "it has failed: broken"
    assert story.states(TaskState.SKIPPED) == ["c", "d"]
    assert story.run.explain("c", 1.0).reasons[0].message == "it was skipped: task 'b' did not succeed"


def test_a_condition_is_an_input_like_any_other_while_it_is_not_known() -> None:
    story = RunScene(task("a"), task("b", condition=Condition(OutputRef("a", "out"))))
    assert [r.task_id for r in story.run.explain("b", 1.0).reasons] == ["a"]


def test_explanation_counts_a_bounded_number_of_tasks_when_many_are_queued() -> None:
    scene = Scene(node(cpu=1))
    scene.tell(*[ready(f"t{number}") for number in range(3 * MAX_AHEAD)])
    scene.succeed("t0", at=1.0)
    turns = {name: [r.message for r in scene.why(name) if r.kind is ReasonKind.TURN] for name in ("t502", "t2999")}
    assert turns == {
        "t502": ["500 tasks of its kind go first"],
        "t2999": [f"at least {MAX_AHEAD} tasks of its kind go first"],
    }
    last = scene.explanation("t2999")
    assert last is not None
    assert last.start_in_s is None


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.sets(st.integers(0, 39)), st.integers(1, 50))
@settings(max_examples=50, deadline=None)
def test_count_of_tasks_ahead_equals_that_of_a_scan(priorities: list[int], cancelled: set[int], most: int) -> None:
    scene = Scene(node(cpu=1))
    scene.tell(ready("running"))
    scene.tell(*[ready(f"t{number}", priority=priority) for number, priority in enumerate(priorities)])
    scene.cancel(*[f"t{number}" for number in cancelled])
    queued = [found for found in scene.machine.tasks.values() if found.group is not None]
    for one in queued:
        assert one.group is not None
        ahead = sum((other.rank, other.ticket) < (one.rank, one.ticket) for other in queued)
        assert one.group.count_ahead(one, most) == min(ahead, most)
