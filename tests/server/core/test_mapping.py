"""Graphs that depend on values: maps over lists known at run time, conditions, references one can do without."""

import re

import pytest

from lattice_server.core.errors import InvalidError
from lattice_server.core.messages import (
    CancelRequested,
    RunFinished,
    TaskFailed,
    TaskReady,
    TaskSkipped,
)
from lattice_server.core.model import (
    Artifact,
    BindingList,
    Condition,
    FailureKind,
    FailurePolicy,
    OutputRef,
    Payload,
    Selection,
    TaskSpec,
    WorkflowSpec,
)
from lattice_server.core.run import dag
from lattice_server.core.run.bindings import NULL
from lattice_server.core.run.limits import Bounds
from lattice_server.core.states import RunState, TaskState
from lattice_server.core.steps import finish
from tests.server.core.cluster import value
from tests.server.core.graphs import SYNC, task
from tests.server.core.run_scenes import ANYWAY, RunScene, mapped, optional, when

# Maps.


def test_mapped_task_runs_one_task_for_each_item_and_outputs_a_list() -> None:
    story = RunScene(task("a"), mapped("m", "a"), task("sum", ["m"]))
    assert [e.split_outputs for e in story.effects if isinstance(e, TaskReady)] == [("out",)]
    assert story.succeed("a", ["1", "2", "3"]) == ["m[0]", "m[1]", "m[2]"]
    assert story.inputs("m[1]") == {"from_a": value("2")}
    for index in (2, 0):
        assert story.succeed(f"m[{index}]", outputs={"out": value(f"{index}")}) == []
    assert story.succeed("m[1]", outputs={"out": value("1")}) == ["sum"]
    assert story.inputs("sum") == {"from_m": BindingList((value("0"), value("1"), value("2")))}
    assert story.run.final_task_ids() == ["sum"]


def test_a_map_over_a_map_pairs_items() -> None:
    story = RunScene(task("a"), mapped("m", "a"), mapped("n", "m"))
    story.succeed("a", ["1", "2"])
    story.succeed("m[0]")
    assert story.succeed("m[1]") == ["n[0]", "n[1]"]
    assert story.run.final_task_ids() == ["n", "n[0]", "n[1]"]


def test_a_map_over_an_empty_list_succeeds_at_once() -> None:
    story = RunScene(task("a"), mapped("m", "a"), mapped("n", "m"), task("sum", ["n"]))
    assert story.succeed("a", []) == ["sum"]
    assert story.inputs("sum") == {"from_n": BindingList(())}


@pytest.mark.parametrize("failed", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_an_optional_map_gives_null_in_the_place_of_each_item_that_failed(failed: tuple[int, ...]) -> None:
    story = RunScene(task("a"), mapped("m", "a"), optional("sum", "m"), policy=ANYWAY)
    story.succeed("a", ["1", "2", "3"])
    found: list[str] = []
    for index in range(3):
        outputs = {"out": value(f"{index}")}
        found += story.fail(f"m[{index}]") if index in failed else story.succeed(f"m[{index}]", outputs=outputs)
    assert found == ["sum"]
    wanted = tuple(NULL if index in failed else value(f"{index}") for index in range(3))
    assert story.inputs("sum") == {"from_m": BindingList(wanted)}


def test_an_optional_map_gives_null_in_the_place_of_an_item_that_was_cancelled() -> None:
    story = RunScene(task("a"), mapped("m", "a"), optional("sum", "m"), policy=ANYWAY)
    story.succeed("a", ["1", "2"])
    story.cancelled("m[0]")
    story.succeed("m[1]")
    assert story.inputs("sum") == {"from_m": BindingList((NULL, value("1")))}


@pytest.mark.parametrize("why", ["too large", "skipped", "cancelled"])
def test_an_optional_map_that_never_became_items_gives_null(why: str) -> None:
    bounds = Bounds(max_items=1) if why == "too large" else Bounds()
    story = RunScene(task("a"), mapped("m", "a"), optional("sum", "m"), policy=ANYWAY, bounds=bounds)
    match why:
        case "too large":
            story.succeed("a", ["1", "2"])
        case "skipped":
            story.fail("a")
        case "cancelled":
            story.take(story.run.cancel_task("m", "enough", 1.0))
    assert story.inputs("sum") == {"from_m": NULL}


def test_a_map_over_too_many_items_fails_and_says_so() -> None:
    story = RunScene(task("a"), mapped("m", "a"), bounds=Bounds(max_items=2))
    story.succeed("a", ["1", "2", "3"])
    (failed,) = [e for e in story.effects if isinstance(e, TaskFailed)]
    assert failed.failure.kind is FailureKind.RESOURCES
    assert "3 tasks" in failed.failure.message
    assert story.run.state is RunState.FAILED


def test_the_tasks_of_the_run_bound_a_map_too() -> None:
    story = RunScene(task("a"), mapped("m", "a"), bounds=Bounds(max_tasks=4))
    story.succeed("a", ["1", "2", "3"])
    assert story.run.state is RunState.FAILED


def test_a_list_that_came_without_its_items_fails_the_map() -> None:
    story = RunScene(task("a"), mapped("m", "a"))
    story.succeed("a")
    assert story.states(TaskState.FAILED) == ["m"]


@pytest.mark.parametrize("policy", list(FailurePolicy))
def test_a_failed_item_fails_the_map(policy: FailurePolicy) -> None:
    story = RunScene(task("a"), mapped("m", "a"), task("sum", ["m"]), policy=policy)
    story.succeed("a", ["1", "2"])
    story.fail("m[0]")
    if policy is ANYWAY:
        assert not any(isinstance(e, CancelRequested) for e in story.effects), "the other items go on"
        story.succeed("m[1]")
    else:
        assert [e.task_ids for e in story.effects if isinstance(e, CancelRequested)] == [("m[1]",)]
        story.cancelled("m[1]")
    assert story.states(TaskState.FAILED) == ["m", "m[0]"]
    assert story.states(TaskState.SKIPPED) == ["sum"]
    assert story.run.failure is not None
    assert story.run.failure.task_id == "m[0]"
    assert story.run.state is RunState.FAILED


@pytest.mark.parametrize("policy", list(FailurePolicy))
def test_cancelling_a_mapped_task_cancels_its_items(policy: FailurePolicy) -> None:
    story = RunScene(task("a"), mapped("m", "a"), task("sum", ["m"]), policy=policy)
    story.succeed("a", ["1", "2", "3"])
    story.succeed("m[0]")
    story.take(story.run.cancel_task("m", "enough", 2.0))
    assert [e.task_ids for e in story.effects if isinstance(e, CancelRequested)] == [("m[1]", "m[2]")]
    story.cancelled("m[1]")
    story.cancelled("m[2]")
    assert story.states(TaskState.CANCELLED) == ["m", "m[1]", "m[2]"]
    assert story.run.state is RunState.CANCELLED


def test_a_mapped_task_that_is_cancelled_before_its_list_is_there_never_grows() -> None:
    story = RunScene(task("a"), mapped("m", "a"), policy=ANYWAY)
    story.take(story.run.cancel_task("m", "enough", 0.5))
    story.succeed("a", ["1"])
    assert list(story.run.tasks) == ["a", "m"]
    assert story.run.state is RunState.CANCELLED


def test_a_map_over_a_parameter_is_refused() -> None:
    with pytest.raises(InvalidError, match="wired to an output"):
        RunScene(task("a"), TaskSpec("m", SYNC, inputs={"x": value("[]")}, over="x"))


@pytest.mark.parametrize("ids", [("m", "m[0]"), ("m[0]", "m")])
def test_no_task_may_have_the_id_of_an_item(ids: tuple[str, str]) -> None:
    tasks = {"m": mapped("m", "a"), "m[0]": task("m[0]")}
    with pytest.raises(InvalidError, match="item of the mapped task"):
        RunScene(task("a"), *[tasks[name] for name in ids])
    graph = dag.build(WorkflowSpec((task("a"), tasks[ids[0]])))
    with pytest.raises(InvalidError, match="item of the mapped task"):
        finish(dag.extending(graph, [tasks[ids[1]]], ())).apply(graph)


def test_brackets_alone_are_fine() -> None:
    story = RunScene(task("x[0]"), task("m[a]", ["x[0]"]))
    assert story.ready() == ["x[0]", "m[a] after x[0]"]


# Conditions.


@pytest.mark.parametrize(
    ("text", "is_met"),
    [("true", True), ("1", True), ('"no"', True), ("false", False), ("null", False), ("0", False), ('""', False)],
)
@pytest.mark.parametrize("is_negated", [False, True])
def test_condition_is_met_by_true_values(text: str, is_met: bool, is_negated: bool) -> None:
    story = RunScene(task("a"), when("b", "a", is_negated=is_negated))
    assert story.ready() == ["a"], "what hangs on a condition is not handed over early"
    assert story.succeed("a", outputs={"out": value(text)}) == (["b"] if is_met is not is_negated else [])


@pytest.mark.parametrize(
    ("text", "equals", "is_met"),
    [
        ("8.0", "8", True),
        ("8", "8.5", False),
        ("1", "true", False),
        ("0", "false", False),
        ('"1"', "1", False),
        ("9007199254740993", "9007199254740992", False),
        ('{"a":1,"b":[2,3]}', '{ "b": [2, 3.0], "a": 1 }', True),
        ("[1,2]", "[2,1]", False),
        ('"\u00e9"', '"\\u00e9"', True),
        ("no json", "no", False),
        ("[" * 100_000, "[]", False),
    ],
)
def test_condition_compares_json_values_and_not_text(text: str, equals: str, is_met: bool) -> None:
    story = RunScene(task("a"), when("b", "a", equals=value(equals)))
    assert story.succeed("a", outputs={"out": value(text)}) == (["b"] if is_met else [])


@pytest.mark.parametrize("text", ["0.0", "-0.0", "0e5", " false", "[ ]", "{\n}"])
def test_condition_is_not_met_by_empty_values(text: str) -> None:
    story = RunScene(task("a"), when("b", "a"))
    assert story.succeed("a", outputs={"out": value(text)}) == []


@pytest.mark.parametrize("is_negated", [False, True])
def test_a_condition_may_compare(is_negated: bool) -> None:
    right = {"equals": value('"yes"'), "is_negated": is_negated}
    story = RunScene(task("a"), when("b", "a", **right))
    assert story.succeed("a", outputs={"out": value('"yes"')}) == ([] if is_negated else ["b"])
    assert story.run.is_terminal is is_negated


def test_skipping_on_purpose_goes_on_and_the_run_succeeds() -> None:
    story = RunScene(task("a"), when("b", "a"), task("c", ["b"]), task("d", ["c"]))
    story.succeed("a", outputs={"out": value("false")})
    assert [(e.task_id, e.failure) for e in story.effects if isinstance(e, TaskSkipped)] == [
        ("b", None),
        ("c", None),
        ("d", None),
    ]
    assert story.effects[-1] == RunFinished(RunState.SUCCEEDED, None)


def test_optional_input_is_null_when_its_task_was_skipped() -> None:
    story = RunScene(
        task("a"), when("left", "a"), when("right", "a", is_negated=True), optional("join", "left", "right")
    )
    assert story.succeed("a", outputs={"out": value("1")}) == ["left"]
    assert story.succeed("left", outputs={"out": value('"l"')}) == ["join"]
    assert story.inputs("join") == {"from_left": value('"l"'), "from_right": value("null")}


def test_task_is_skipped_when_a_required_input_is_missing_beside_an_optional_one() -> None:
    both = TaskSpec("x", SYNC, inputs={"a": OutputRef("a", "out", True), "b": OutputRef("b", "out")}, outputs=("out",))
    story = RunScene(task("a"), task("b", ["a"]), both, policy=ANYWAY)
    story.fail("a")
    assert story.states(TaskState.SKIPPED) == ["b", "x"]


@pytest.mark.parametrize("is_first_optional", [False, True])
def test_output_is_required_when_it_is_optional_in_one_place_only(is_first_optional: bool) -> None:
    inputs = {f"i{n}": OutputRef("a", "out", is_first_optional is (n == 0)) for n in range(2)}
    story = RunScene(task("a"), TaskSpec("x", SYNC, inputs=inputs, outputs=("out",)), policy=ANYWAY)
    story.fail("a")
    assert story.states(TaskState.SKIPPED) == ["x"]


def test_list_of_a_mapped_task_is_required() -> None:
    inputs = {"i": OutputRef("a", "out", is_optional=True)}
    story = RunScene(task("a"), TaskSpec("m", SYNC, inputs=inputs, outputs=("out",), over="i"), policy=ANYWAY)
    story.fail("a")
    assert story.states(TaskState.SKIPPED) == ["m"]


def test_optional_input_is_null_when_its_task_failed_and_independent_tasks_finish() -> None:
    story = RunScene(task("a"), optional("b", "a"), policy=ANYWAY)
    assert story.fail("a") == ["b"]
    assert story.inputs("b") == {"from_a": value("null")}


def test_task_fails_when_its_condition_is_not_json() -> None:
    story = RunScene(task("a"), when("b", "a"))
    story.succeed("a", outputs={"out": Payload("application/octet-stream", b"?")})
    assert "not JSON" in next(e.failure.message for e in story.effects if isinstance(e, TaskFailed))


def test_task_fails_when_the_value_of_its_condition_is_not_on_the_server() -> None:
    story = RunScene(task("a"), when("b", "a"))
    story.succeed("a", outputs={"out": Payload("application/json", Artifact("x", 300_000, "node"))})
    failure = story.run.tasks["b"].failure
    assert failure is not None
    assert "output a.out, cannot be evaluated: its 300000 bytes are too many for a message" in failure.message


@pytest.mark.parametrize(("items", "runs"), [(["1"], True), ([], False)])
def test_a_mapped_task_is_true_when_it_has_items(items: list[str], runs: bool) -> None:
    story = RunScene(task("a"), mapped("m", "a"), when("b", "m"))
    ready = story.succeed("a", items)
    ready = story.succeed("m[0]") if items else ready
    assert ready == (["b"] if runs else [])


def test_a_mapped_task_is_nothing_to_compare() -> None:
    with pytest.raises(InvalidError, match="not one value to compare"):
        RunScene(task("a"), mapped("m", "a"), when("b", "m", equals=value("[]")))


def test_long_chain_of_skipped_tasks_ends_without_recursion() -> None:
    chain = [mapped("m0", "a"), *[mapped(f"m{n}", f"m{n - 1}") for n in range(1, 2000)]]
    story = RunScene(task("a"), *chain)
    story.succeed("a", [])
    assert story.run.state is RunState.SUCCEEDED
    skips = [
        optional(f"s{n}", f"s{n - 1}" if n else "a", condition=Condition(OutputRef("a", "out"))) for n in range(2000)
    ]
    story = RunScene(task("a"), *skips)
    story.succeed("a", outputs={"out": value("0")})
    assert len(story.states(TaskState.SKIPPED)) == 2000


# Parts of outputs.


def part(task_id: str, source: str, *path: str | int, is_optional: bool = False, **settings: object) -> TaskSpec:
    """Return a task that is given a part of another's output."""
    inputs = {"x": OutputRef(source, "out", is_optional, path)}
    return TaskSpec(task_id, SYNC, inputs=inputs, outputs=("out",), **settings)  # type: ignore[arg-type]


def test_a_part_of_an_output_is_selected_by_the_worker_when_the_output_is_known() -> None:
    inputs = {"x": OutputRef("a", "out", path=("k", 0)), "y": OutputRef("b", "out")}
    story = RunScene(task("a"), task("b"), TaskSpec("c", SYNC, inputs=inputs, outputs=("out",)))
    assert story.succeed("a", outputs={"out": value("9")}) == ["c after b"]
    assert story.inputs("c") == {"x": Selection(value("9"), ("k", 0)), "y": OutputRef("b", "out")}


def test_a_part_of_an_output_is_sent_ahead_as_the_output_it_is_of() -> None:
    story = RunScene(task("a"), part("b", "a", "k"))
    assert story.ready() == ["a", "b after a"]
    assert story.inputs("b") == {"x": OutputRef("a", "out", path=("k",))}


def test_a_part_of_a_mapped_output_is_selected_from_the_list() -> None:
    story = RunScene(task("a"), mapped("m", "a"), part("b", "m", 1, "k"))
    story.succeed("a", ["1", "2"])
    story.succeed("m[0]")
    assert story.succeed("m[1]") == ["b"]
    assert story.inputs("b") == {"x": Selection(BindingList((value("1"), value("1"))), (1, "k"))}


def test_an_optional_part_is_null_when_its_task_failed() -> None:
    story = RunScene(task("a"), part("b", "a", "k", is_optional=True), policy=ANYWAY)
    assert story.fail("a") == ["b"]
    assert story.inputs("b") == {"x": NULL}


@pytest.mark.parametrize(
    ("made", "path", "runs"),
    [
        ('{"k": true}', ("k",), True),
        ('{"k": []}', ("k",), False),
        ('[0, {"k": "yes"}]', (1, "k"), True),
        ("[[0]]", (0, -1), False),
    ],
)
def test_a_condition_looks_at_a_part_when_it_selects_one(made: str, path: tuple[str | int, ...], runs: bool) -> None:
    condition = Condition(OutputRef("a", "out", path=path))
    story = RunScene(task("a"), task("b", condition=condition))
    assert story.succeed("a", outputs={"out": Payload("application/json", made)}) == (["b"] if runs else [])


@pytest.mark.parametrize(
    ("made", "text"),
    [('{"j": 1}', r"it has no part \['k'\]"), ("[1]", r"it has no part \['k'\]"), ("soup", "not JSON")],
)
def test_a_task_fails_when_its_condition_selects_a_part_that_is_not_there(made: str, text: str) -> None:
    story = RunScene(task("a"), task("b", condition=Condition(OutputRef("a", "out", path=("k",)))))
    story.succeed("a", outputs={"out": Payload("application/json", made)})
    failure = story.run.tasks["b"].failure
    assert failure is not None
    assert failure.kind is FailureKind.PAYLOAD
    assert re.search(text, failure.message)


def test_a_map_over_a_part_is_refused() -> None:
    spec = WorkflowSpec((task("a"), part("m", "a", "k", over="x")))
    with pytest.raises(InvalidError) as caught:
        dag.build(spec)
    assert [found.field for found in caught.value.violations] == ["tasks[1].over"]


def test_a_condition_on_a_part_of_a_mapped_output_is_refused() -> None:
    condition = Condition(OutputRef("m", "out", path=(0,)))
    spec = WorkflowSpec((task("a"), mapped("m", "a"), task("b", condition=condition)))
    with pytest.raises(InvalidError) as caught:
        dag.build(spec)
    assert [found.field for found in caught.value.violations] == ["tasks[2].condition.output.path"]
