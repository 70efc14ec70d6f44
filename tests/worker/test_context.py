"""`context.spawn` as a task calls it: ids, bound inputs and refused arguments."""

import copy
import itertools
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_client import entrypoint, task
from lattice_worker import context
from lattice_worker.convert import binding_tree, spawned_from_frame
from lattice_worker.runner.encoding.values import PayloadError
from lattice_worker.runner.invocation.binding import bind_all
from lattice_worker.runner.invocation.called import Call
from lattice_worker.runner.invocation.output import Output
from lattice_worker.runner.invocation.output import current as running
from lattice_worker.task_context.spawn_arguments import take_id

from lattice.v1 import payload_pb2, task_pb2  # isort: skip


class Sent:
    """Stands for the control socket: keeps the tasks that were spawned."""

    def __init__(self) -> None:
        self.tasks: list[task_pb2.TaskSpec] = []
        self.owner = os.getpid()

    def send(self, header: dict[str, Any], blobs: Any = ()) -> None:
        spawned = spawned_from_frame(header["task"], list(blobs), task_pb2.Function(), "node")
        self.tasks += spawned.tasks

    def received(self, made: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of the last task, when the tasks of these ids made these JSON values."""
        blobs: list[bytes] = []
        outputs = {name: payload_pb2.Payload(media_type="application/json", json=text) for name, text in made.items()}
        inputs = {name: binding_tree(tree, "", blobs, outputs) for name, tree in self.tasks[-1].inputs.items()}
        return bind_all(inputs, blobs)


@pytest.fixture
def sent(tmp_path: Path) -> Iterator[Sent]:
    """A running attempt of the task `parent`, and the frames it has sent."""
    channel: Any = Sent()
    places = {"folder": str(tmp_path), "store": str(tmp_path), "inline_limit": 10_000, "log_limit": 1000}
    header = {"id": "lease", "attempts": [["run", "parent", 1]], "batched": False, **places}
    token = running.set(Output(channel, header))
    yield channel
    running.reset(token)


@task
def give(v: Any) -> Any:
    return v


def leaf(x: int, y: int = 0) -> int:
    return x + y


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["k", "k-2", "k"], ["k", "k-2", "k-3"]),
        (["k", "k", "k-2"], ["k", "k-2", "k-2-2"]),
        (["k-2", "k-3", "k", "k", "k"], ["k-2", "k-3", "k", "k-4", "k-5"]),
        ([None, "give-2", None], ["give", "give-2", "give-3"]),
    ],
)
def test_no_two_spawned_tasks_have_one_id(sent: Sent, names: list[str | None], ids: list[str]) -> None:
    made = [context.spawn(give, {"v": number}, name=name) for number, name in enumerate(names)]
    assert [found.task_id for found in made] == [f"parent/{name}" for name in ids]
    assert [found.task_id for found in sent.tasks] == [f"parent/{name}" for name in ids]


LABELS = st.lists(st.builds("".join, st.tuples(st.sampled_from("ab"), st.sampled_from(["", "-2", "-3", "-2-2"]))))


@given(labels=LABELS)
def test_an_id_has_the_first_number_that_is_free(labels: list[str]) -> None:
    taken: dict[str, int] = {}
    free: set[str] = set()
    for label in labels:
        numbered = (f"p/{label}-{number}" for number in itertools.count(2))
        wanted = next(found for found in itertools.chain([f"p/{label}"], numbered) if found not in free)
        free.add(wanted)
        assert take_id("p", label, taken) == wanted
    assert taken.keys() == free


def test_to_find_an_id_takes_as_long_for_the_last_of_many_tasks_as_for_the_first() -> None:
    class Counting(dict[str, int]):
        looks = 0

        def __contains__(self, key: object) -> bool:
            self.looks += 1
            return super().__contains__(key)

    taken = Counting()
    for _ in range(1000):
        take_id("p", "same", taken)
    assert taken.looks <= 2000


def test_ids_of_spawned_tasks_stay_within_the_limit_when_tasks_spawn_100_deep(sent: Sent) -> None:
    output: Any = running.get()

    def descend() -> list[str]:
        ids = ["plan"]
        for _ in range(100):
            output.header |= {"attempts": [["run", ids[-1], 1]], "spawned": {}}
            ids.append(context.spawn(give, {"v": 1}, name="plan").task_id)
        return ids

    ids = descend()
    assert ids[:3] == ["plan", "plan/plan", "plan/plan/plan"]
    assert len(set(ids)) == 101
    assert max(map(len, ids)) <= 120, "a number has to fit behind it"
    assert descend() == ids, "a later attempt spawns tasks of the same ids"


def test_threads_of_a_task_spawn_under_ids_of_their_own(sent: Sent) -> None:
    output = running.get()

    def spawn() -> None:
        running.set(output)
        for _ in range(50):
            context.spawn(give, {"v": 1})

    threads = [threading.Thread(target=spawn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({found.task_id for found in sent.tasks}) == 200


def test_a_spawn_that_failed_takes_no_id(sent: Sent) -> None:
    with pytest.raises(PayloadError):
        context.spawn(give, {"v": threading.Lock()}, name="k")
    assert context.spawn(give, {"v": 1}, name="k").task_id == "parent/k"


def test_a_dict_with_outputs_keeps_the_order_of_its_keys(sent: Sent) -> None:
    made = context.spawn(give, {"v": 1}).output
    keys = [chr(ord("z") - number) for number in range(20)]
    for order in (keys, keys[::-1]):
        context.spawn(give, {"v": [dict.fromkeys(order, made)]})
        assert [list(item) for item in sent.received({"result": "1"})["v"]] == [order]


def test_a_dict_for_another_language_stays_one(sent: Sent) -> None:
    made = context.spawn(give, {"v": 1}).output
    context.spawn(entrypoint("js/count", inputs=["v"]), {"v": {"z": made, "a": 1}})
    assert set(sent.tasks[-1].inputs["v"].map.entries) == {"z", "a"}
    context.spawn(entrypoint("statistics:mean", inputs=["v"]), {"v": {"z": made, "a": 1}})
    assert list(sent.received({"result": "1"})["v"]) == ["z", "a"]


def test_a_spawned_task_is_given_the_part_of_an_output_that_is_selected(sent: Sent) -> None:
    made = context.spawn(give, {"v": 1}).output
    text = '{"k": [1, {"j": 2}]}'
    context.spawn(give, {"v": made["k"][-1]["j"]})
    assert sent.received({"result": text})["v"] == 2
    context.spawn(give, {"v": (made["k"][0], made)})
    assert sent.received({"result": text})["v"] == (1, {"k": [1, {"j": 2}]})
    assert repr(made["k"][0]).endswith("['k'][0]")
    assert made["k"] == made["k"] != made
    with pytest.raises(PayloadError, match="selected by up to 32 texts and whole numbers"):
        made[1.0]


# Texts.


def test_neither_a_spawned_task_nor_its_output_becomes_a_text(sent: Sent) -> None:
    made = context.spawn(give, {"v": 1})
    for value in (made, made.output):
        for write in (str, "{}".format, "%s".__mod__):
            with pytest.raises(PayloadError, match="give"):
                write(value)


@pytest.mark.parametrize(
    "value",
    [
        lambda made: f"{[made.output]}",
        lambda made: f"{made.output!r}",
        lambda made: f"{made!r}",
        lambda made: f"{made.outputs}",
        lambda made: {"a": [f"see {[made.output]}"]},
        lambda made: {"a": (repr([repr(made.output)]), made.output)},
        lambda made: {repr(made.output): made.output},
        lambda made: repr(made.output).encode(),
    ],
)
def test_a_text_with_the_repr_of_an_output_is_refused(sent: Sent, value: Callable[[Any], Any]) -> None:
    made = context.spawn(give, {"v": 1}, name="it's")
    text = "spawn of 'give': input 'v' holds Spawned.* as a text, which has no value yet: give the output itself"
    with pytest.raises(PayloadError, match=text):
        context.spawn(give, {"v": value(made)})


def test_a_text_with_the_repr_of_another_attempts_output_is_a_text(sent: Sent) -> None:
    context.spawn(give, {"v": repr(context.SpawnedOutput("elsewhere", "result"))})
    assert sent.received({})["v"] == "SpawnedOutput(task_id='elsewhere', output='result')"


READS: list[Callable[[Any], Any]] = [
    lambda x: x.title,
    lambda x: "a" + x,
    lambda x: x + 1,
    lambda x: 1 - x,
    lambda x: x < 1,
    lambda x: x(),
    int,
    list,
    lambda x: -x,
    range,
]


@pytest.mark.parametrize("read", READS)
def test_a_spawned_output_raises_with_advice_when_it_is_read(sent: Sent, read: Callable[[Any], Any]) -> None:
    made = context.spawn(give, {"v": 1}).output
    with pytest.raises(PayloadError, match="has no value yet: give it to a task as an input"):
        read(made)
    assert not hasattr(made, "title")
    with pytest.raises(AttributeError, match="has no attribute '_repr_html_'"):
        getattr(made, "_repr_html_")  # noqa: B009


def called() -> Call:
    output = running.get()
    assert output is not None
    return Call(output.questions, "parent/give", ("result",))


@pytest.mark.parametrize(
    "read",
    [
        *READS,
        lambda x: x == 1,
        lambda x: x in [1],
        lambda x: x["key"],
        lambda x: pickle.dumps([x]),
        lambda x: context.spawn(give, {"v": [x]}),
    ],
)
def test_a_call_raises_with_advice_when_it_is_used_as_its_value(sent: Sent, read: Callable[[Any], Any]) -> None:
    made = called()
    advice = (
        "'parent/give'\\) is a call and not its value: `await` it in a coroutine, or use its result\\(\\) in a function"
    )
    with pytest.raises(PayloadError, match=advice):
        read(made)


@pytest.mark.parametrize("read", [lambda made: made.result(), lambda made: made.get, lambda made: made.__await__()])
def test_a_spawned_task_names_call_when_it_is_waited_for(sent: Sent, read: Callable[[Any], Any]) -> None:
    made: Any = context.spawn(give, {"v": 1})
    advice = r"this task does not wait for it: wire its output .* context.call\(task, inputs\)"
    with pytest.raises((AttributeError, TypeError), match=advice):
        read(made)
    assert not hasattr(made, "__array__")
    assert copy.copy(made.output) == made.output


def test_calls_can_be_in_sets_and_lists(sent: Sent) -> None:
    first, second = (called() for _ in range(2))
    assert len({first, second, first}) == 2
    assert [first, second].index(second) == 1
    assert weakref.ref(first)() is first


# Refused arguments.


wrong: list[tuple[Callable[[], Any], str]] = [
    (lambda: context.spawn(leaf, 1), r"spawn of 'leaf': the inputs are one dict by name, .* not 1"),  # type: ignore[arg-type]
    (lambda: context.spawn(leaf, x=1), r"the inputs are one dict by name, .* not the argument 'x'"),
    (lambda: context.spawn(leaf, {"x": 1}, name=5), "name must be a text, not 5"),  # type: ignore[arg-type]
    (lambda: context.spawn(leaf, {"x": 1}, name="a\nb"), r"must have no line break, not 'a\\nb'; give name"),
    (lambda: context.spawn(leaf, {"x": 1}, after=["first"]), "after must hold tasks .* not 'first'"),  # type: ignore[list-item]
    (lambda: context.spawn(leaf, {"x": 1}, after="first"), r"after must be a list .* not 'first'"),  # type: ignore[arg-type]
    (lambda: context.spawn(leaf, {"x": 1}, after=context.SpawnedTask("a", ("b",))), "after must be a list"),  # type: ignore[arg-type]
    (lambda: context.spawn(leaf, {"x": 1}, after=[context.SpawnedOutput("a", "b")]), "after takes tasks"),  # type: ignore[list-item]
    (lambda: context.spawn("leaf"), "it needs a function, a @task or an entrypoint.* not the text 'leaf'"),  # type: ignore[arg-type]
    (lambda: context.spawn(leaf, {"z": 1}), "has no input 'z' and needs input 'x'; its inputs: x, y"),
    (lambda: context.spawn(leaf), "'leaf': the task needs input 'x'; its inputs: x, y"),
    (lambda: context.spawn(give, {"w": 1}), "has no input 'w' and needs input 'v'; its inputs: v"),
    (lambda: context.spawn(entrypoint("js/x", inputs=["a"])), "needs input 'a'"),
    (lambda: context.spawn(leaf, {1: 1}), "the name of an input must be a text, not 1"),  # type: ignore[dict-item]
]


@pytest.mark.parametrize(("call", "text"), wrong)
def test_a_wrong_call_of_spawn_is_refused_naming_the_argument(sent: Sent, call: Callable[[], Any], text: str) -> None:
    with pytest.raises(context.SpawnError, match=text):
        call()
    assert sent.tasks == []


def test_a_function_of_any_inputs_takes_any(sent: Sent) -> None:
    def anything(**more: Any) -> None: ...
    def params(params: Any) -> None: ...

    for function in (anything, params, task(anything), task(params), entrypoint("js/x")):
        context.spawn(function, {"one": 1})
    assert len(sent.tasks) == 5


def test_an_input_that_cannot_be_pickled_is_named_with_the_part_at_fault(sent: Sent) -> None:
    made = context.spawn(give, {"v": 1}).output
    with pytest.raises(PayloadError) as caught:
        context.spawn(leaf, {"x": {"made": [made], "k": [threading.Lock()]}})
    text = "spawn of 'leaf': input 'x', entry 'k', item 0 (_thread.lock) cannot be pickled: "
    assert str(caught.value).startswith(text)
