"""Inputs: the task receives each value with every output in it replaced by the output's value."""

import asyncio
import copy
import dataclasses
import inspect
import json
import threading
import typing
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lattice.v1 import payload_pb2

from lattice_client import LatticeTask, TaskDefinitionError, TaskOutput, entrypoint, task, template
from lattice_client.convert import payloads
from lattice_client.convert.inputs import Binder
from lattice_client.graph.outputs import Scope
from lattice_client.graph.workflow import Graph
from lattice_worker.convert import binding_tree
from lattice_worker.runner.encoding.values import PayloadError
from lattice_worker.runner.invocation.binding import bind_all
from tests.client.test_payloads import jsonable, same


class Pair(typing.NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Query:
    text: Any
    more: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    text: Any


class Model(pydantic.BaseModel):
    text: Any


@attrs.define
class Slotted:
    text: Any


class Plain:
    def __init__(self, text: Any) -> None:
        self.text = text

    def __eq__(self, other: object) -> bool:
        return type(other) is Plain and other.text == self.text

    def __repr__(self) -> str:
        return f"Plain({self.text!r})"

    def __hash__(self) -> int:
        return 0


def bound(value: Any, store: Any = None, *, is_for_python: bool = True) -> payload_pb2.Binding:
    """The message of an input."""
    message = payload_pb2.Binding()
    scope = Scope(lambda output: True, {"t", "it's", "around"})
    binder = Binder("input 'x' of task 't'", store, scope, is_for_python)
    asyncio.run(binder.fill(message, value))
    return message


def received(value: Any, made: dict[str, Any], *, is_for_python: bool = True) -> Any:
    """Return the value that a task receives for an input, given the values of outputs by name."""
    outputs = {name: payloads.inline(*payloads.encode(item)) for name, item in made.items()}
    blobs: list[bytes] = []
    tree = binding_tree(bound(value, is_for_python=is_for_python), "", blobs, outputs)
    return bind_all({"x": tree}, blobs)["x"]


def output(name: str = "a") -> TaskOutput:
    return TaskOutput("t", name)


wrappers: list[Callable[[Any], Any]] = [
    lambda x: [x],
    lambda x: {"key": x, "other": [1, "ü", None]},
    lambda x: (x, 1),
    lambda x: Pair(x, second=2),
    Query,
    Frozen,
    lambda x: Model(text=x),
    Slotted,
    Plain,
    lambda x: {1: x},
    lambda x: OrderedDict(z=1, a=x),
    lambda x: defaultdict(list, {"k": x}),
    lambda x: deque([x], maxlen=3),
    lambda x: [b"raw", {"k": (x,)}],
]


# A structure is a function of what stands where the outputs do, so that it can be built with outputs and with values.
Structure = Callable[[Callable[[str], Any]], Any]


def _leaf(name: str) -> Structure:
    return lambda fill: fill(name)


def _constant(value: Any) -> Structure:
    return lambda fill: copy.deepcopy(value)


def _wrapped(wrap: Callable[[Any], Any], inner: Structure) -> Structure:
    return lambda fill: wrap(inner(fill))


def _both(inner: list[Structure]) -> Structure:
    return lambda fill: [one(fill) for one in inner]


structures: st.SearchStrategy[Structure] = st.recursive(
    st.sampled_from("abc").map(_leaf) | jsonable.map(_constant),
    lambda inner: st.builds(_wrapped, st.sampled_from(wrappers), inner) | st.lists(inner, max_size=3).map(_both),
    max_leaves=8,
)


@given(structures, st.fixed_dictionaries(dict.fromkeys("abc", jsonable)))
def test_a_value_has_the_outputs_values_in_their_places(structure: Structure, made: dict[str, Any]) -> None:
    found, expected = received(structure(output), made), structure(lambda name: made[name])
    assert found == expected
    assert repr(found) == repr(expected)  # types, and the order of keys


@given(jsonable, jsonable)
def test_json_with_outputs_stays_readable_by_any_language(value: Any, made: Any) -> None:
    message = bound({"here": [output(), copy.deepcopy(value)], "there": value}, is_for_python=False)
    assert message.map.entries["here"].list.items[0].output.output == "a"
    assert json.loads(message.map.entries["there"].payload.json) == value
    found = received({"here": [output()], "there": value}, {"a": made}, is_for_python=False)
    assert same(sorted(found.items()), [("here", [made]), ("there", value)])
    assert bound([output(), {"one": output()}]).list.items[1].map.entries["one"].output.output == "a"


def test_a_dict_that_holds_outputs_keeps_the_order_of_its_keys() -> None:
    keys = [chr(ord("z") - number) for number in range(20)]
    for order in (keys, keys[::-1]):
        assert list(received({key: output() for key in order}, {"a": 1})) == order


@pytest.mark.parametrize("wrap", wrappers)
def test_an_output_is_found_in_containers_of_any_kind(wrap: Callable[[Any], Any]) -> None:
    assert received(wrap(wrap(output())), {"a": {"k": (1, {2})}}) == wrap(wrap({"k": (1, {2})}))


def test_sharing_and_cycles_are_kept_around_outputs() -> None:
    shared = [output("a")]
    cyclic: dict[str, Any] = {"one": shared, "two": shared, "out": output("b")}
    cyclic["self"] = cyclic
    found = received(cyclic, {"a": 1, "b": [2]})
    assert found["self"] is found
    assert found["one"] is found["two"]
    assert (found["one"], found["out"]) == ([1], [2])
    made = output("b")
    first, second = received((made, made), {"b": [2]})
    assert first is second


def test_an_output_in_a_function_or_a_set_arrives() -> None:
    made = output("a")
    assert received({made, 3}, {"a": 1}) == {1, 3}
    assert received({made: 1}, {"a": "key"}) == {"key": 1}
    assert received(lambda: made, {"a": 5})() == 5
    assert received(partial(max, made), {"a": 5})(3) == 5


def test_a_set_of_outputs_that_cannot_be_in_a_set_fails_naming_the_input() -> None:
    with pytest.raises(PayloadError, match="input 'x' cannot be rebuilt here: TypeError: unhashable type: 'list'"):
        received({output()}, {"a": [1]})


def test_arrays_travel_beside_the_pickle_that_has_outputs() -> None:
    found = received(Query(output(), more=np.arange(5)), {"a": 1})
    found.more += 1
    assert (found.text, found.more.tolist()) == (1, [1, 2, 3, 4, 5])


def test_a_large_value_around_an_output_is_uploaded() -> None:
    sent = []

    async def store(media_type: str, data: bytes) -> payload_pb2.Payload:
        sent.append(data)
        return payload_pb2.Payload(media_type=media_type, artifact=payload_pb2.Artifact(artifact_id="here"))

    message = bound((output(), b"x" * payloads.ALWAYS_INLINE_BYTES), store)
    first, second = message.list.items
    assert (first.payload.artifact.artifact_id, first.payload.media_type) == ("here", payloads.WITH_OUTPUTS)
    assert (second.output.output, len(sent)) == ("a", 1)


@pytest.mark.parametrize("depth", [20, 60, 150])
def test_output_is_found_at_any_depth(depth: int) -> None:
    def nested(inner: Any) -> Any:
        for _ in range(depth):
            inner = [inner]
        return inner

    assert received(nested(output()), {"a": 1}) == nested(1)


def test_a_value_that_is_nested_too_deep_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(TaskDefinitionError, match=r"input 'x' of task 't' \(list\) cannot be pickled: .*deep"):
        bound(deep)
    with pytest.raises(TaskDefinitionError, match=r"input 'x' of task 't' \(list\) cannot be pickled: .*deep"):
        bound([output(), deep])


# Refused inputs.


class Holder:
    def __init__(self, **held: Any) -> None:
        self.__dict__.update(held)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (lambda bad: bad, ""),
        (lambda bad: {"x": [bad]}, ", entry 'x', item 0"),
        (lambda bad: {"made": output(), "x": (1, Holder(it=bad))}, ", entry 'x', item 1, attribute 'it'"),
        (lambda bad: [[output()], output(), {"k": bad}], ", item 2, entry 'k'"),
        (lambda bad: [0] * 5000 + [bad], ", item 5000"),
    ],
)
def test_the_part_of_an_input_that_cannot_be_pickled_is_named(value: Callable[[Any], Any], path: str) -> None:
    with pytest.raises(TaskDefinitionError) as caught:
        bound(value(threading.Lock()))
    text = "(_thread.lock) cannot be pickled: cannot pickle '_thread.lock' object"
    advice = "pass data from which the task can make it"
    assert str(caught.value) == f"input 'x' of task 't'{path} {text}; {advice}"


@task
def number(n: int = 0) -> int:
    return n


@task(outputs=["low", "high"])
def around(n: int) -> dict[str, int]:
    return {"low": n - 1, "high": n + 1}


@pytest.fixture
def graph() -> Graph[None]:
    """An empty workflow of no client."""
    return Graph(None)


nestings: list[Callable[[Any], Any]] = [
    lambda x: x,
    lambda x: [x],
    lambda x: {"k": {"k": x}},
    lambda x: (x,),
    Query,
    Plain,
]


@pytest.mark.parametrize("nest", nestings)
def test_a_task_or_all_its_outputs_are_refused_at_any_depth(graph: Graph[None], nest: Callable[[Any], Any]) -> None:
    first = graph.add_task(around, {"n": 1})
    with pytest.raises(TaskDefinitionError, match=r"input 'x' of task 't'.*: 'around' is a task; wire one of its"):
        bound(nest(first))
    with pytest.raises(TaskDefinitionError, match=r"input 'x' of task 't'.*: .* 'around' are not one value; .*\"low\""):
        bound(nest(first.outputs))


def test_a_dataclass_turned_into_a_dict_keeps_its_outputs(graph: Graph[None]) -> None:
    first = graph.add_task(number)
    as_dict = dataclasses.asdict(Query(first.output, more=[first.output]))
    assert as_dict == {"text": first.output, "more": [first.output]}
    assert Model(text=first.output).model_dump() == {"text": first.output}
    with pytest.raises(TaskDefinitionError, match="'number' is a task"):
        bound(dataclasses.asdict(Query(first)))


def test_a_copied_output_is_the_same_output(graph: Graph[None]) -> None:
    first = graph.add_task(number)
    for copied in (copy.copy(first.output), copy.deepcopy({"k": [first.output]})["k"][0]):
        assert copied == first.output
        assert copied.owner is first


def test_an_output_in_the_code_of_a_task_is_refused(graph: Graph[None]) -> None:
    made = graph.add_task(number).output
    with pytest.raises(TaskDefinitionError, match=r"uses variable 'made' of [\w ]+: TaskOutput\(.*\) has no value yet"):
        task(lambda: made).pack()


@pytest.mark.parametrize(
    "read",
    [
        *[str, "{}".format, "%s".__mod__, list, len, bool, bytes, dict, int, float, range, sorted, round, "%d".__mod__],
        *[lambda x: 1 in x, lambda x: x.title, lambda x: x(), lambda x: x(1, key=2)],
        *[lambda x: "a" + x, lambda x: x + "a", lambda x: x + 1, lambda x: 1 - x, lambda x: -x, lambda x: x | {}],
        *[lambda x: x < 1, lambda x: x >= 1, lambda x: [1, 2][x], lambda x: x @ x, lambda x: divmod(7, x)],
    ],
)
def test_output_raises_with_advice_when_it_is_read_locally(read: Callable[[Any], Any]) -> None:
    for unread in (output(), template("{x}", x=output())):
        with pytest.raises(TaskDefinitionError, match=r"has no value yet: .*(template\(|as an input|when=)"):
            read(unread)


def test_output_raises_attribute_error_when_a_library_probes_it() -> None:
    for probed in (output(), template("{x}", x=output())):
        assert not hasattr(probed, "shape")
        assert getattr(probed, "model_dump", None) is None
        for name in ("_repr_html_", "__array__", "__wrapped__", "_ipython_canary_method_should_not_exist_"):
            with pytest.raises(AttributeError, match=f"has no attribute {name!r}") as caught:
                getattr(probed, name)
            assert not isinstance(caught.value, TaskDefinitionError)
        assert repr(pydantic.TypeAdapter(Any).validate_python(probed)) == repr(probed)
        assert np.array([probed], dtype=object).shape == (1,)
        assert inspect.isawaitable(probed) is inspect.isfunction(probed) is False
        assert copy.deepcopy([probed])[0] is probed
    assert not hasattr(TaskOutput.__new__(TaskOutput), "task_id")  # as while a copy is made


@pytest.mark.parametrize("write", [str, "{}".format, "%s".__mod__, "{:>20}".format])
def test_neither_a_task_nor_its_outputs_become_a_text(graph: Graph[None], write: Callable[[Any], Any]) -> None:
    added = graph.add_task(around, {"n": 1})
    for value in (added, added.outputs):
        assert "around" in repr(value)
        with pytest.raises(TaskDefinitionError, match=r"task.* template\("):
            write(value)


@pytest.mark.parametrize(
    "write",
    [
        lambda made: f"{[made.output]}",
        lambda made: f"{made.output!r}",
        lambda made: f"{made.output.optional()!r}",
        lambda made: f"{[made]}",
        lambda made: f"{[made.outputs]}",
        lambda made: repr([repr(made.output)]),
        lambda made: repr(template("{x}", x=made.output)),
    ],
)
@pytest.mark.parametrize(
    "nest",
    [
        lambda text: text,
        lambda text: [{"role": "user", "content": text}],
        lambda text: {text: output()},
        lambda text: (text, {1}),
        lambda text: Query(text, more=output()),
        lambda text: template(text.replace("{", "{{").replace("}", "}}")),
        lambda text: text.encode(),
        lambda text: {"long": "ü" * 300_000 + text},
    ],
)
@pytest.mark.parametrize("name", ["t", "it's"])
def test_input_is_refused_when_a_text_contains_an_output(
    graph: Graph[None], write: Callable[[Any], str], nest: Callable[[str], Any], name: str
) -> None:
    made = graph.add_task(number, task_id=name)
    with pytest.raises(
        TaskDefinitionError, match=r"input 'x' of task 't' holds \w+\(task_id=.* as a text, .*template\("
    ):
        bound(nest(write(made)))


def test_text_is_accepted_when_it_names_a_task_of_another_run() -> None:
    for text in ("TaskOutput(task_id='elsewhere', output='a')", "TaskOutput(task_id=", "f(task_id='t')"):
        assert received([text], {}) == [text]


def test_an_output_can_be_shown_compared_and_be_a_key() -> None:
    assert repr([output()]) == "[TaskOutput(task_id='t', output='a')]"
    assert output() == output()
    assert output() != output().optional()
    for compare in (
        lambda: output() == "a",
        lambda: output() != "a",
        lambda: output() in ["a"],
        lambda: output() == "a",
    ):
        with pytest.raises(TaskDefinitionError, match=r"to run a task only if it has a value, use .* equals="):
            compare()
    assert {output(): 1}[output()] == 1


# Templates.


@given(st.text(), st.text(), jsonable)
def test_a_template_is_filled_in_where_the_task_runs(before: str, after: str, made: Any) -> None:
    before, after = (text.replace("{", "{{").replace("}", "}}") for text in (before, after))
    text = f"{before}{{x}}{after}{{y!r}}"
    assert received(template(text, x=output(), y=1), {"a": made}) == text.format(x=made, y=1)


def test_templates_nest_and_lie_anywhere() -> None:
    inner = template("<{x:>{width}}>", x=output("a"), width=output("b"))
    value = [{"role": "user", "content": template("{inner} {text}", inner=inner, text="plain")}]
    expected = [{"role": "user", "content": "<  7> plain"}]
    assert received(value, {"a": 7, "b": 3}) == expected
    assert received(template("nothing"), {}) == "nothing"


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        ("{x}", {}, "no value is given for x"),
        ("{x} {y:{z}}", {"x": 1}, "no value is given for y, z"),
        ("{x}", {"x": 1, "y": 2}, "has no field y"),
        ("{}", {}, r"the field {} must be a name"),
        ("{0}", {"x": 1}, r"the field \{0\} must be a name"),
        ("{x.y}", {"x": 1}, r"the field {x.y} must be a name"),
        ("{x[0]}", {"x": 1}, r"the field {x\[0\]} must be a name"),
        ("{x", {"x": 1}, "not a valid format string"),
        ("}", {}, "not a valid format string"),
        (3, {}, "a template must be a text, not int"),
    ],
)
def test_template_raises_when_a_field_is_wrong(text: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskDefinitionError, match=message):
        template(text, **fields)


def test_a_format_that_does_not_fit_the_value_fails_naming_the_input() -> None:
    with pytest.raises(PayloadError, match="input 'x' cannot be rebuilt here: ValueError: Unknown format code 'd'"):
        received(template("{x:d}", x=output()), {"a": "text"})


# Outputs of other workflows.


def test_input_is_refused_when_its_output_is_of_another_workflow(graph: Graph[None]) -> None:
    here, there = graph.add_task(number), Graph(None).add_task(number)
    assert here.output == there.output
    assert graph.has(here.output)
    assert graph.has(here.outputs["result"].optional())
    assert not graph.has(there.output)
    assert not graph.has(there.output.optional())
    assert graph.has(TaskOutput("number", "result"))


def test_an_entry_point_of_another_language_is_wired_by_json(graph: Graph[None]) -> None:
    counted: LatticeTask = graph.add_task(entrypoint("js/word_count", inputs=["text"]), {"text": "a b"})
    message = bound({"counts": [counted.output, 1], "other": 1}, is_for_python=False)
    assert message.map.entries["counts"].list.items[0].output.task_id == counted.task_id


PARTS = {"choices": [{"text": "first"}, {"text": "second"}], "n": {"deep": [[1, 2]]}}


@pytest.mark.parametrize(
    ("select", "part"),
    [
        (lambda x: x["choices"], PARTS["choices"]),
        (lambda x: x["choices"][1]["text"], "second"),
        (lambda x: x["choices"][-1]["text"], "second"),
        (lambda x: x["n"]["deep"][0][1], 2),
    ],
)
@pytest.mark.parametrize("made", [PARTS, {**PARTS, "pickled": {1, 2}}], ids=["json", "pickle"])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [0, x], Frozen], ids=["bare", "list", "pickle"])
def test_a_task_is_given_the_part_of_an_output_that_is_selected(
    select: Callable[[Any], Any], part: Any, made: Any, wrap: Callable[[Any], Any]
) -> None:
    assert received(wrap(select(output())), {"a": made}) == wrap(part)


@pytest.mark.parametrize(
    ("select", "text"),
    [
        (lambda x: x["gone"], r"no part \['gone'\]: it is a dict with 'choices', 'n'$"),
        (lambda x: x["choices"][2], r"no part \['choices'\]\[2\]: its part \['choices'\] is a list of 2$"),
        (lambda x: x["choices"]["text"], r"no part \['choices'\]\['text'\]: .* is a list of 2$"),
        (
            lambda x: x["choices"][0]["text"][0],
            r"no part .*\[0\]: its part \['choices'\]\[0\]\['text'\] is a value of type str$",
        ),
        (lambda x: x[0], r"no part \[0\]: it is a dict"),
    ],
)
def test_an_input_is_refused_when_its_output_has_no_such_part(select: Callable[[Any], Any], text: str) -> None:
    with pytest.raises(PayloadError, match=f"^input 'x': the output it is wired to has {text}"):
        received(select(output()), {"a": PARTS})


@pytest.mark.parametrize("key", [1.0, True, None, slice(1), ("a",), b"k"])
def test_part_is_refused_when_its_key_is_neither_a_text_nor_an_integer(key: Any) -> None:
    with pytest.raises(TaskDefinitionError, match="is selected by a str or an int"):
        output()[key]


def test_part_is_refused_when_it_is_deeper_than_the_contract_allows() -> None:
    found = output()
    for _ in range(32):
        found = found[0]
    with pytest.raises(TaskDefinitionError, match="32 steps"):
        found[0]


def test_part_of_an_output_has_the_options_of_the_output() -> None:
    part = output().optional()["k"]
    assert part.is_optional
    assert part.required()["j"].path == ("k", "j")
    assert repr(part) == "TaskOutput(task_id='t', output='a')['k'].optional()"
    assert part != output().optional()
    assert len({part, output().optional()["k"]}) == 1


def test_a_map_over_a_part_of_an_output_is_refused(graph: Graph[None]) -> None:
    first = graph.add_task(number)
    with pytest.raises(TaskDefinitionError, match=r"over is .*, a part of an output; have that task"):
        graph.map(lambda x: x, first.output["items"])
