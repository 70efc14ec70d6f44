"""Adding tasks: unique ids, and wrong inputs that raise before anything is sent."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lattice.v1 import task_pb2

from lattice_client import LatticeTask, TaskDefinitionError, entrypoint, task
from lattice_client.graph.workflow import MAX_ID_LENGTH, Graph


def count(text: str, word: str) -> int:
    return text.split().count(word)


def nothing() -> int:
    return 1


def params_alone(params: dict[str, Any]) -> dict[str, Any]:
    return params


class Source:
    def fetch(self, n: int) -> int:
        return n

    @task
    def decorated(self, n: int) -> int:
        return n


@pytest.fixture
def graph() -> Graph[None]:
    """An empty workflow of no client."""
    return Graph(None)


# Ids.

names = st.sampled_from(["step", "step-2", "step-2-2", "step-3", "other"])


@given(st.lists(st.tuples(names, names | st.none()), max_size=12))
def test_every_added_task_has_its_own_id(added: list[tuple[str, str | None]]) -> None:
    graph: Graph[None] = Graph(None)
    kept: list[LatticeTask] = []
    for name, task_id in added:
        if task_id in graph.tasks:
            with pytest.raises(TaskDefinitionError, match=f"the task id '{task_id}' is taken"):
                graph.add_task(task(name=name)(nothing), task_id=task_id)
        else:
            kept.append(graph.add_task(task(name=name)(nothing), task_id=task_id))
            assert kept[-1].task_id.startswith(name) or kept[-1].task_id == task_id
    assert list(graph.tasks.values()) == kept
    assert [found.task_id for found in kept] == list(graph.tasks)


def test_tasks_of_one_function_are_numbered(graph: Graph[None]) -> None:
    added = [graph.add_task(nothing, task_name="shown").task_id for _ in range(3)]
    assert added == ["nothing", "nothing-2", "nothing-3"]
    assert {found.display_name for found in graph.tasks.values()} == {"shown"}


@pytest.mark.parametrize("read", [lambda added: added.result(), lambda added: added.value, lambda a: a.__await__()])
def test_a_task_names_the_output_of_its_run_when_it_is_waited_for(
    graph: Graph[None], read: Callable[[Any], Any]
) -> None:
    with pytest.raises((AttributeError, TypeError), match=r"belongs to a run: run.output\(task\) waits for it"):
        read(graph.add_task(nothing))


def test_an_id_can_be_chosen_for_a_task_and_a_map(graph: Graph[None]) -> None:
    first = graph.add_task(nothing, task_id="a b/ü")
    mapped = graph.map(count, {"text": first.output}, {"word": "x"}, task_id="m")
    assert (first.task_id, mapped.task_id) == ("a b/ü", "m")
    assert mapped.output.task_id == "m"
    with pytest.raises(TaskDefinitionError, match="the task id 'm' is taken"):
        graph.map(count, {"text": first.output}, {"word": "x"}, task_id="m")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"task_id": ""}, "must have 1 to 128 characters and no line break, not ''"),
        ({"task_id": "x" * (MAX_ID_LENGTH + 1)}, "must have 1 to 128 characters"),
        ({"task_id": "a\nb"}, "must have 1 to 128 characters and no line break"),
        ({"task_id": "\ud800"}, "the task id must be valid Unicode"),
        ({"task_id": 3}, "the task id must be a text, not 3"),
        ({"task_name": 3}, "task_name must be a text, not 3"),
        ({"task_name": "\ud800"}, "task_name must be valid Unicode"),
    ],
)
def test_a_wrong_id_or_name_is_refused(graph: Graph[None], settings: dict[str, Any], text: str) -> None:
    with pytest.raises(TaskDefinitionError, match=f"task 'nothing': .*{text}"):
        graph.add_task(nothing, **settings)
    assert not graph.tasks


def test_add_task_asks_for_an_id_when_the_name_is_not_a_valid_one(graph: Graph[None]) -> None:
    long = task(name="x" * 200)(nothing)
    with pytest.raises(TaskDefinitionError, match="give task_id"):
        graph.add_task(long)
    assert graph.add_task(long, task_id="short").display_name == "x" * 200


# Inputs.


@pytest.mark.parametrize(
    ("function", "inputs", "text"),
    [
        (count, {"txt": "a", "word": "b"}, "has no input 'txt' and needs input 'text'; its inputs: text, word$"),
        (count, {}, "needs inputs 'text', 'word'; its inputs: text, word$"),
        (count, {"text": "", "word": "", "x": 1, "y": 2}, "has no inputs 'x', 'y'; its inputs: text, word$"),
        (nothing, {"x": 1}, "has no input 'x'; its inputs: none$"),
        (task(inputs=[])(params_alone), {"x": 1}, "has no input 'x'; its inputs: none$"),
        (entrypoint("js/word_count", inputs=["text"]), {"txt": ""}, "has no input 'txt' and needs input 'text'"),
        (count, "x", r'the inputs are one dict, add_task\(count, {"text": ..., "word": ...}\), not str'),
        (count, ["x"], "the inputs are one dict, .*, not list"),
        (nothing, 3, "the inputs are one dict, .*, not int"),
        (params_alone, {1: 2}, "the name of an input must be a text, not 1"),
        (params_alone, {"\ud800": 2}, "the name of an input must be valid Unicode"),
        (params_alone, {"params": {"x": 1}}, r"receives all its inputs as one dict, `params`: give them by name"),
        (Source.fetch, {"n": 1}, r"needs input 'self'; .* make a bound method the task: add_task\(instance"),
        (Source.decorated, {"n": 1}, r"needs input 'self'; .*instance.decorated, \.\.\.\), without @task"),
        (Source().decorated, {"n": 1}, "make a bound method the task"),
    ],
)
def test_error_names_all_wrong_inputs_and_the_accepted_ones(
    graph: Graph[None], function: Callable[..., Any], inputs: Any, text: str
) -> None:
    with pytest.raises(TaskDefinitionError, match=text):
        graph.add_task(function, inputs)
    assert not graph.tasks


def test_error_asks_for_a_dict_when_inputs_are_keywords(graph: Graph[None]) -> None:
    more: dict[str, Any] = {"text": "a", "word": "b"}
    with pytest.raises(TaskDefinitionError, match="add_task has no argument text, word; the inputs are one dict"):
        graph.add_task(count, **more)


def test_a_bound_method_is_a_task(graph: Graph[None]) -> None:
    added = graph.add_task(Source().fetch, {"n": 1})
    assert (added.task_id, added.definition.inputs) == ("fetch", ("n",))


def test_the_outputs_of_a_task_may_be_the_inputs_of_another(graph: Graph[None]) -> None:
    made = graph.add_task(task(outputs=["text", "word"])(params_alone), {"x": 1})
    assert graph.add_task(count, made.outputs).inputs == {"text": made.outputs["text"], "word": made.outputs["word"]}


def test_an_input_named_params_goes_to_a_function_that_takes_any_by_keyword(graph: Graph[None]) -> None:
    def anything(**more: Any) -> int:
        return len(more)

    assert graph.add_task(anything, {"params": 1}).inputs == {"params": 1}


@pytest.mark.parametrize(
    ("over", "text"),
    [
        ([1, 2], "over is a list, not exactly one output of another task; for a list that is known"),
        (lambda first: [first.output], "over is a list"),
        (lambda first: first, "over is the task 'nothing', .* one output of another task; give one: task.output$"),
        (lambda first: first.outputs, r"over is all outputs of a task, Outputs\(.*\), .*; give one: task.output$"),
        (lambda first: {"text": first.output, "word": first.output}, "exactly one output"),
        (lambda first: {"text": [first.output]}, "over is a list"),
    ],
)
def test_map_raises_when_over_is_not_exactly_one_output(graph: Graph[None], over: Any, text: str) -> None:
    first = graph.add_task(nothing)
    with pytest.raises(TaskDefinitionError, match=text):
        graph.map(count, over(first) if callable(over) else over, {"word": "x"})


def test_partial_function_does_not_require_its_bound_arguments(graph: Graph[None]) -> None:
    found = graph.add_task(functools.partial(count, word="x"), {"text": "y"}).definition
    assert (found.required, found.call_style) == ({"text"}, task_pb2.CALL_STYLE_KEYWORDS)
