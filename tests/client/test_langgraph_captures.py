"""The check that a node's code changes nothing that it captures, by functions that do and functions that do not."""

import asyncio
import functools
import importlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langgraph.graph import START, StateGraph

from lattice_client import LangGraphClient, TaskDefinitionError
from lattice_client.langgraph import captures

CHANGES: list[Callable[..., Any]] = []
KEEPS: list[Callable[..., Any]] = []
TARGETS = {"text": "", "numbers": [1], "table": {"a": [1]}, "group": {1}}


def changes(function: Any) -> Any:
    CHANGES.append(function)
    return function


def keeps(function: Any) -> Any:
    KEEPS.append(function)
    return function


class Node:
    """A node that is an object, with methods that are nodes."""

    uses = 0

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.cache: dict[Any, Any] = {}
        self.counts: Counter[Any] = Counter()
        self.model: Any = None
        self.is_on = False

    def __call__(self, state: Any) -> Any:
        self.uses += 1

    def logs(self, state: Any) -> Any:
        self.log.append(state)

    def counts_words(self, state: Any) -> Any:
        self.counts[state] += 1

    def counts_all(self, state: Any) -> Any:
        self.counts.update(state)

    def switches(self, state: Any) -> Any:
        self.is_on = not self.is_on

    def caches(self, state: Any) -> Any:
        self.cache[state] = self.cache.setdefault(1, state)

    def loads(self, state: Any) -> Any:
        self.model = self.model or object()
        return len(self.log)


def _closures() -> None:
    seen: list[Any] = []
    found: dict[str, Any] = {}
    count = 0
    node = Node()
    table: list[list[Any]] = [[]]

    class Meter(Node):
        """Is sent with the functions that use it, as classes of scripts are."""

        def reads(self, state: Any) -> Any:
            self.uses += 1

        def reads_twice(self, state: Any) -> Any:
            return self.reads(state)

        def __call__(self, state: Any) -> Any:
            return self.reads(state)

        def loads_once(self, state: Any) -> Any:
            self.model = self.model or state
            self.cache[state] = len(self.log)

    meter = Meter()
    numbers = itertools.count()

    @changes
    def appends(state: Any) -> Any:
        seen.append(state)

    @changes
    async def appends_in_coroutine(state: Any) -> Any:
        seen.append(state)

    @changes
    def sets_entry(state: Any) -> Any:
        found["state"] = state

    @changes
    def sets_entry_among_others(state: Any) -> Any:
        _, (found["state"], *_) = 1, state

    @changes
    def deletes_entry(state: Any) -> Any:
        del found["state"]

    @changes
    def changes_entry(state: Any) -> Any:
        found["states"].append(state)

    @changes
    def counts(state: Any) -> Any:
        nonlocal count
        count += 1

    @changes
    def sets_attribute(state: Any) -> Any:
        node.model = state

    @changes
    def changes_attribute(state: Any) -> Any:
        node.log.append(state)

    @changes
    def changes_in_inner_function(state: Any) -> Any:
        def inner() -> None:
            seen.append(state)

        inner()

    @changes
    def calls_one_that_changes(state: Any) -> Any:
        return appends(state)

    changes(lambda state: seen.append(state) or state)

    @changes
    def changes_by_another_name(state: Any) -> Any:
        log = node.log
        log.append(state)

    @changes
    def changes_by_a_name_of_another_name(state: Any) -> Any:
        this = node
        (these := this.log).append(state)
        return these

    @changes
    def changes_items(state: Any) -> Any:
        for lines in table:
            lines.append(state)

    @changes
    def keeps_a_method_that_changes(state: Any) -> Any:
        add = seen.append
        add(state)

    @changes
    def gives_a_method_away(state: Any) -> Any:
        list(map(seen.append, [state]))

    @changes
    def takes_the_next(state: Any) -> Any:
        return next(numbers)

    @changes
    def takes_all(state: Any) -> Any:
        for number in numbers:
            return number

    @changes
    def calls_a_method_that_changes(state: Any) -> Any:
        meter.reads(state)

    @changes
    def calls_a_method_that_calls_one(state: Any) -> Any:
        other = meter
        return other.reads_twice(state)

    @changes
    def calls_an_object_that_counts(state: Any) -> Any:
        return meter(state)

    @keeps
    def calls_methods_that_change_nothing(state: Any) -> Any:
        return meter.loads_once(state), len(meter.log)

    @keeps
    def changes_a_copy(state: Any) -> Any:
        copy = list(seen)
        copy.append(state)
        lines = seen
        lines = [*lines]
        lines.append(state)
        for word in seen:
            word.append(state)
        for number in list(numbers):
            copy.append(number)

    @keeps
    def reads(state: Any) -> Any:
        return [*seen, found.get("state"), count, node.log]

    @keeps
    def has_names_of_its_own(state: Any) -> Any:
        seen = [state]
        seen.append(state)

        def inner() -> None:
            nonlocal seen
            seen = []

        inner()
        return seen

    @keeps
    def has_an_inner_function_with_the_name(state: Any) -> Any:
        def inner(seen: list[Any]) -> None:
            seen.append(state)

        inner([])
        return seen

    @keeps
    def changes_its_argument(state: Any) -> Any:
        state["seen"].append(len(seen))
        return state


_closures()
NODE = Node()
CHANGES += [NODE, NODE.logs, NODE.counts_words, NODE.counts_all, NODE.switches]
KEEPS += [NODE.caches, NODE.loads]


@pytest.mark.parametrize("function", CHANGES, ids=lambda function: getattr(function, "__name__", "object"))
def test_code_that_changes_captured_variables_is_refused(function: Any) -> None:
    with pytest.raises(TaskDefinitionError, match=r"node 'n' cannot run on Lattice: its code changes .+ \(.+:\d+\)"):
        captures.check(function, "node 'n'")


@pytest.mark.parametrize("function", KEEPS, ids=lambda function: function.__name__)
def test_code_that_changes_nothing_is_accepted(function: Any) -> None:
    captures.check(function, "node 'n'")


def test_globals_of_a_script_are_checked_and_caches_in_them_are_accepted() -> None:
    found: dict[str, Any] = {"__name__": "__main__", "log": [], "cache": {}, "count": 0, "model": None}
    for text, is_accepted in (
        ("log.append(state)", False),
        ("global count; count += 1", False),
        ("global count; count = count + 1", False),
        ("cache['n'] += 1", False),
        ("cache[state] = 1", True),
        ("global model; model = model or 1", True),
        ("log = []; log.append(state)", True),
    ):
        function = _function(f"def node(state):\n    {text}\n", found)
        if is_accepted:
            captures.check(function, "node 'n'")
        else:
            with pytest.raises(TaskDefinitionError, match=":2\\)"):
                captures.check(function, "node 'n'")


def _function(source: str, names: dict[str, Any]) -> Any:
    import linecache

    file = f"<script {hash(source)}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    exec(compile(source, file, "exec"), names)
    return names["node"]


STEPS = {
    "text": ["nonlocal text; text += 'x'"],
    "numbers": ["numbers.append(1)", "numbers[0] = 5", "numbers += [1]", "numbers.sort(reverse=True); numbers.pop()"],
    "table": ["table['b'] = 1", "table.update(b=1)", "table['a'].append(1)", "del table['a']", "table['a'][0] += 1"],
    "group": ["group.add(2)", "group.discard(1)", "group |= {2}"],
}
READS = ["len(text)", "sorted(numbers)", "table.get('a')", "group | {5}", "numbers[0]", "list(table)"]


@given(st.lists(st.sampled_from([*READS, *(step for steps in STEPS.values() for step in steps)]), max_size=4))
def test_a_function_is_refused_if_a_call_changes_a_captured_variable(steps: list[str]) -> None:
    if any("text" in step or "+= [" in step or "|=" in step for step in steps):
        # `nonlocal` declarations come first.
        steps = ["nonlocal text, numbers, group", *(step.removeprefix("nonlocal text; ") for step in steps)]
    body = "\n".join(f"        {step}" for step in steps) or "        pass"
    variables = "".join(f"    {name} = {value!r}\n" for name, value in TARGETS.items())
    source = f"def make():\n{variables}    def node(state):\n{body}\n    return node, lambda: {tuple(TARGETS)}\n"
    source = source.replace(str(tuple(TARGETS)), f"({', '.join(TARGETS)})")
    made = _function(source + "node = make\n", {"__name__": "__main__"})
    node, values = made()
    before = repr(values())
    try:
        captures.check(node, "node 'n'")
        is_accepted = True
    except TaskDefinitionError:
        is_accepted = False
    try:
        node(None)
    except (KeyError, IndexError):
        return
    if is_accepted:
        assert repr(values()) == before


def test_an_event_of_asyncio_is_refused_by_compile() -> None:
    started = asyncio.Event()

    async def waits(state: Any) -> Any:
        await started.wait()

    graph: Any = StateGraph(dict)
    graph.add_node("waits", waits)
    graph.add_edge(START, "waits")
    with (
        LangGraphClient("127.0.0.1:1") as lattice,
        pytest.raises(TaskDefinitionError, match=r"node 'waits' .*captures an asyncio.Event"),
    ):
        lattice.compile(graph)


def test_a_decorated_function_is_refused() -> None:
    with (
        LangGraphClient("127.0.0.1:1") as lattice,
        pytest.raises(TaskDefinitionError, match=r"changes self\.log "),
    ):
        lattice.task(NODE.logs)


MODULE = """
log, cache, model, count = [], {}, None, 0

class Meter:
    uses = 0

    def read(self):
        self.uses += 1

meter = Meter()

def note(text):
    log.append(text)

def appends(state):
    log.append(state)

def calls_one_that_appends(state):
    return note(state)

def calls_a_method_that_counts(state):
    return meter.read()

def counts(state):
    global count
    count += 1

def caches(state):
    global model
    model = cache[state] = model or state
    return [*log, meter]
"""


def test_code_in_modules_of_the_project_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nodes_of_project.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    nodes = importlib.import_module("nodes_of_project")
    for function in (nodes.appends, nodes.calls_one_that_appends, nodes.calls_a_method_that_counts, nodes.counts):
        with pytest.raises(TaskDefinitionError, match=r"changes (log|self.uses|count) \(.*nodes_of_project.py:"):
            captures.check(function, "node 'n'")
    captures.check(nodes.caches, "node 'n'")


def test_code_of_installed_packages_is_not_checked() -> None:
    captures.check(importlib.import_module("warnings").simplefilter, "node 'n'")


def test_code_of_installed_packages_in_a_class_that_is_sent_is_not_checked() -> None:
    @dataclass
    class Context:
        user: str

    @functools.singledispatch
    def name(value: Any) -> str:
        return "any"

    def greets(state: Any) -> Any:
        return Context(name(state))

    captures.check(greets, "node 'n'")


def test_captured_object_that_cannot_be_sent_is_named_as_the_node_names_it() -> None:
    lock = threading.Lock()

    def waits(state: Any) -> Any:
        with lock:
            return state

    graph: Any = StateGraph(dict)
    graph.add_node("waits", waits)
    graph.add_edge(START, "waits")
    with LangGraphClient("127.0.0.1:1") as lattice, pytest.raises(TaskDefinitionError) as raised:
        lattice.compile(graph)
    assert str(raised.value).startswith(
        "node 'waits' cannot run on Lattice: task 'waits' uses variable 'lock' of an enclosing function (_thread.lock),"
    )
