"""A function is pickled again only when its code changed."""

import copy
import functools
import importlib
import os
import pickle
import subprocess
import sys
import timeit
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_client import LatticeClient, TaskDefinition, task
from lattice_client.code.freshness import Snapshot, file_at
from lattice_client.convert import specs
from lattice_client.graph.workflow import Graph

pytestmark = pytest.mark.slow

SCRIPT = """
import math
from functools import partial

LIMIT = 1
TABLE = {"k": [1, (2, {3})]}
NAMES = [1, "a"]
TOOLS = {}
LARGE = list(range(100_000))

def helper(x):
    return x + LIMIT

def tool():
    return "old"

TOOLS["tool"] = tool

class Thing:
    size = 1
    def method(self):
        return LIMIT

class Box:
    inside = None

BOX = Box()

def make():
    captured = 1
    def inner():
        return captured
    def change(value):
        nonlocal captured
        captured = value
    return inner, change

closure, change = make()
part = partial(helper, x=1)

def defaults(x=[1], *, y={"k": 1}):
    return x, y

def direct():
    return LIMIT

def deep():
    return [helper(1) for _ in range(1)]

def later():
    return defined_later

def shadowed():
    return len([1])

def table():
    return TABLE, NAMES

def tools():
    return {name: found() for name, found in TOOLS.items()}

def method():
    return Thing().method(), Thing.size

def partly():
    return part()

def large():
    return len(LARGE)

def boxed():
    return BOX

def alone():
    return math.pi

def marked(x: Thing = None) -> "Thing":
    return marked.note

marked.note = 1
"""


@pytest.fixture
def script() -> dict[str, Any]:
    """The globals of a script."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(SCRIPT, namespace)
    return namespace


def changed(definition: TaskDefinition[..., Any]) -> Any:
    """The value that a worker would get now."""
    return pickle.loads(definition.pack()[0].python.pickle)()


def setting(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda script: script.__setitem__(name, value)


def new_code(script: dict[str, Any]) -> None:
    script["alone"].__code__ = (lambda: 7).__code__


CHANGES: list[tuple[str, Callable[[dict[str, Any]], Any], Any]] = [
    ("direct", setting("LIMIT", 2), 2),
    ("direct", setting("LIMIT", 1.0), 1.0),
    ("direct", setting("LIMIT", True), True),
    ("deep", setting("LIMIT", 2), [3]),
    ("deep", setting("helper", lambda x: 10), [10]),
    ("deep", lambda script: exec("def helper(x): return 20", script), [20]),
    ("later", setting("defined_later", 5), 5),
    ("shadowed", setting("len", lambda x: 9), 9),
    ("table", lambda script: script["NAMES"].append(2), ({"k": [1, (2, {3})]}, [1, "a", 2])),
    ("table", lambda script: script["TABLE"]["k"][1][1].add(4), ({"k": [1, (2, {3, 4})]}, [1, "a"])),
    ("tools", lambda script: script["TOOLS"].update(more=len), None),
    ("tools", lambda script: script["TOOLS"].update(tool=lambda: "new"), {"tool": "new"}),
    ("tools", lambda script: setattr(script["tool"], "__code__", (lambda: "in place").__code__), {"tool": "in place"}),
    ("method", setting("LIMIT", 2), (2, 1)),
    ("method", lambda script: setattr(script["Thing"], "size", 2), (1, 2)),
    ("method", lambda script: setattr(script["Thing"], "method", lambda self: 3), (3, 1)),
    ("partly", setting("LIMIT", 2), 3),
    ("partly", setting("part", functools.partial(max, 5, 6)), 6),
    ("closure", lambda script: script["change"](2), 2),
    ("defaults", lambda script: script["defaults"].__defaults__[0].append(2), ([1, 2], {"k": 1})),
    ("defaults", lambda script: script["defaults"].__kwdefaults__.update(y=0), ([1], 0)),
    ("defaults", lambda script: setattr(script["defaults"], "__defaults__", (5,)), (5, {"k": 1})),
    ("alone", new_code, 7),
    ("marked", lambda script: setattr(script["marked"], "note", 2), 2),
    ("marked", lambda script: setattr(script["Thing"], "size", 2), 1),
    ("marked", setting("Thing", type("Thing", (), {"size": 3})), None),
]


@pytest.mark.parametrize(("name", "change", "value"), CHANGES)
def test_code_that_changed_is_packed_again(script: dict[str, Any], name: str, change: Any, value: Any) -> None:
    definition = task(script[name])
    try:
        first = definition.pack()[0]
    except NameError:
        first = None
    change(script)
    second = definition.pack()[0]
    assert second is not first
    if value is not None:
        assert changed(definition) == value
        assert type(changed(definition)) is type(value)


@pytest.mark.parametrize("name", sorted({name for name, _, _ in CHANGES} | {"large", "boxed"}))
def test_code_that_did_not_change_is_not_packed_again(script: dict[str, Any], name: str) -> None:
    definition = task(script[name])
    first = definition.pack()[0]
    script["unrelated"] = 1
    script["LIMIT"] = int("1")
    script["NAMES"][0] = 1
    assert definition.pack()[0] is first


def test_an_equal_value_is_no_other_code(script: dict[str, Any]) -> None:
    definition = task(script["table"])
    first = definition.pack()[0]
    script["TABLE"] = copy.deepcopy(script["TABLE"])
    assert definition.pack()[0].digest == first.digest


def test_snapshot_misses_changes_inside_large_and_other_objects_as_documented(script: dict[str, Any]) -> None:
    large, boxed = task(script["large"]), task(script["boxed"])
    first = large.pack()[0], boxed.pack()[0]
    script["LARGE"].append(1)
    script["BOX"].inside = 1
    assert (large.pack()[0], boxed.pack()[0]) == first
    script["LARGE"] = [1]
    assert changed(large) == 1


values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(-1, 1) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=1), inner, max_size=3),
    max_leaves=6,
)


class Odd:
    """Neither equal to anything nor willing to be compared, shown or copied."""

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared")

    __hash__ = None  # type: ignore[assignment]
    __repr__ = __getattr__ = __bool__ = __eq__  # type: ignore[assignment]


@given(values, values, st.booleans())
def test_snapshot_compares_containers_by_content(one: Any, other: Any, has_odd: bool) -> None:
    odd = [Odd()] if has_odd else []
    held = [one, *odd]
    snapshot = Snapshot(lambda: held)
    held[0] = copy.deepcopy(one)
    assert snapshot.is_current()
    held[0] = other
    assert snapshot.is_current() == (repr(one) == repr(other))


def test_a_container_that_holds_itself_is_compared() -> None:
    held: list[Any] = [1]
    held.append(held)
    snapshot = Snapshot(lambda: held)
    assert snapshot.is_current()
    held[0] = 2
    assert not snapshot.is_current()


def test_snapshot_detects_a_change_when_the_task_is_a_callable_object() -> None:
    class Step:
        def __init__(self, function: Any) -> None:
            self.function = function

        def __call__(self) -> Any:
            return self.function()

    step = Step(lambda: 1)
    definition: TaskDefinition[..., Any] = task(step)
    assert changed(definition) == 1
    step.function = lambda: 2
    assert changed(definition) == 2
    bound: TaskDefinition[..., Any] = task(Step(lambda: 3).__call__)
    bound.function.__self__.function = lambda: 4  # type: ignore[attr-defined]
    assert changed(bound) == 4


def test_a_comparison_of_ten_names_takes_microseconds(script: dict[str, Any]) -> None:
    names = ["LIMIT", "NAMES", "TABLE", "helper", "tool", "make", "math", "direct", "deep", "table"]
    exec(f"def ten(): return {', '.join(names)}", script)
    snapshot = Snapshot(script["ten"])
    taken_s = min(timeit.repeat(snapshot.is_current, number=200, repeat=20)) / 200
    assert snapshot.is_current()
    assert taken_s < 200e-6  # 10 µs on an idle processor of 3 GHz


MODULE_SCRIPT = """
import sys
from pathlib import Path
from lattice_client import LatticeClient, task
import helpers_of_mine

@task
def use() -> int:
    import helpers_of_mine
    return helpers_of_mine.value()

with LatticeClient(sys.argv[1]) as client:
    print(client.run_task(use, {}))
    first = use.pack()[0].digest
    print(use.pack()[0].digest == first)
    Path("helpers_of_mine.py").write_text("def value():\\n    return 22\\n")
    print(client.run_task(use, {}))
"""


def test_a_module_whose_file_changed_is_sent_again(address: str, tmp_path: Path) -> None:
    (tmp_path / "helpers_of_mine.py").write_text("def value():\n    return 1\n")
    (tmp_path / "main.py").write_text(MODULE_SCRIPT)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "main.py", address]
    found = subprocess.run(command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.splitlines() == ["{'result': 1}", "True", "{'result': 22}"], found.stderr


def test_file_state_is_read_once_per_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "steps_of_mine.py").write_text("def one(): pass\ndef two(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    steps = importlib.import_module("steps_of_mine")
    graph: Graph[Any] = Graph(None)
    for step in (steps.one, steps.two, steps.one):
        graph.add_task(step)
    looked: list[str] = []
    monkeypatch.setattr(specs, "file_at", lambda path: looked.append(path) or file_at(path))
    for _ in range(2):
        looked.clear()
        specs.pack_code(graph.tasks.values())
    assert looked == [str(tmp_path / "steps_of_mine.py")]


def test_run_uses_the_values_of_globals_at_its_start(client: LatticeClient, script: dict[str, Any]) -> None:
    definition = task(script["deep"])
    plain = client.create_workflow()
    plain.add_task(script["direct"])
    assert client.run_task(definition, {}) == {"result": [2]}
    assert plain.run().result(60) == {"result": 1}
    script["LIMIT"] = 10
    assert client.run_task(definition, {}) == {"result": [11]}
    assert plain.run().result(60) == {"result": 10}


def test_packing_a_task_registers_no_module_when_multiprocessing_is_imported() -> None:
    script = (
        "import multiprocessing, cloudpickle\nfrom lattice_client import task\n@task\ndef f(): pass\nf.pack()\n"
        "print(cloudpickle.list_registry_pickle_by_value())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_code_is_sent_again_when_a_module_in_an_archive_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "own.zip"

    def write(number: int) -> None:
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("archived_helper.py", f"def f():\n    return {number}\n")

    write(1)
    monkeypatch.syspath_prepend(str(archive))
    definition = task(importlib.import_module("archived_helper").f)
    before = definition.pack()[0].digest
    assert definition.pack()[0].digest == before
    write(1000)
    assert definition.pack()[0].digest != before
