"""The sizes, imports and public names of the packages.

An allow list names today's exceptions. It may only shrink: an entry that is no longer needed fails.
"""

import ast
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import lattice_client

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("lattice_client", "lattice_server", "lattice_worker")
FILE_LINES, CLASS_LINES, FUNCTION_LINES = 350, 250, 60

LONG_FILES: set[str] = set()
LONG_CLASSES: set[str] = {
    "lattice_worker.pool.runner_handle:Runner",
    "lattice_server.core.run.run:Run",
    "lattice_worker.attempts.attempt_executor:AttemptExecutor",
}
LONG_FUNCTIONS: set[str] = {"lattice_server.rpc.request_deserializer:_scan"}
CYCLIC: set[str] = set()
# Of a package one module imports each of these libraries, except as listed.
LIBRARIES = ("cloudpickle", "networkx", "opentelemetry", "ray")
SEVERAL_IMPORTERS: set[str] = {
    "lattice_server.executors.ray_driver",
    "lattice_server.executors.ray_transfer",
    "lattice_worker.runner.invocation.failures",
    "lattice_worker.runner.encoding.pickler",
}


class Source(NamedTuple):
    """A module: its number of lines, the sizes of its classes and functions by name, and the names it imports."""

    lines: int
    classes: dict[str, int]
    functions: dict[str, int]
    imports: set[str]


@cache
def modules() -> dict[str, Source]:
    """Return the modules of the three packages, by dotted name."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    return {name: _read(path.read_text(), paths.keys()) for name, path in paths.items()}


def _read(text: str, names: Collection[str]) -> Source:
    found = Source(text.count("\n"), {}, {}, set())
    for node in _statements(ast.parse(text)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            sizes = found.classes if isinstance(node, ast.ClassDef) else found.functions
            size = (node.end_lineno or 0) - node.lineno + 1
            sizes[node.name] = max(size, sizes.get(node.name, 0))
        elif isinstance(node, ast.Import):
            found.imports.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module
            members = (f"{node.module}.{alias.name}" for alias in node.names)
            found.imports.update(member if member in names else node.module for member in members)
    return found


def _statements(parent: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements below a node, without their expressions, which are most of a tree."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for node in getattr(parent, field, ()):
            yield node
            yield from _statements(node)


def test_files_have_at_most_350_lines() -> None:
    assert {name for name, source in modules().items() if source.lines > FILE_LINES} == LONG_FILES


def test_classes_have_at_most_250_lines() -> None:
    sizes = {f"{name}:{made}": size for name, source in modules().items() for made, size in source.classes.items()}
    assert {name for name, size in sizes.items() if size > CLASS_LINES} == LONG_CLASSES


def test_functions_have_at_most_60_lines() -> None:
    sizes = {f"{name}:{made}": size for name, source in modules().items() for made, size in source.functions.items()}
    assert {name for name, size in sizes.items() if size > FUNCTION_LINES} == LONG_FUNCTIONS


def test_modules_have_no_import_cycles_when_type_checking_counts() -> None:
    graph = {name: source.imports & modules().keys() for name, source in modules().items()}
    assert _cyclic(graph) == CYCLIC


def _cyclic(graph: dict[str, set[str]]) -> set[str]:
    """Return the nodes left after all without successors, or without predecessors, are removed repeatedly."""
    while True:
        targets = set[str]().union(*graph.values())
        kept = {name: found & graph.keys() for name, found in graph.items() if found & graph.keys() and name in targets}
        if kept == graph:
            return set(graph)
        graph = kept


def test_cyclic_finds_the_nodes_of_a_cycle_and_no_others() -> None:
    assert _cyclic({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == {"b", "c"}
    assert _cyclic({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == set()
    assert _cyclic({"a": {"a"}}) == {"a"}


def test_each_library_is_imported_by_one_module_of_a_package() -> None:
    several = set()
    for package in PACKAGES:
        for library in LIBRARIES:
            users = [
                name
                for name, source in modules().items()
                if name.split(".")[0] == package and library in {used.split(".")[0] for used in source.imports}
            ]
            several |= set(users) if len(users) > 1 else set()
    assert several == SEVERAL_IMPORTERS


def test_the_client_exports_the_names_it_imports_in_order() -> None:
    tree = ast.parse(Path(lattice_client.__file__).read_text())
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in checked.body if isinstance(node, ast.ImportFrom)]
    places = {alias.name: str(node.module) for node in imports for alias in node.names}
    # Type checkers read the imports, and the interpreter the table.
    assert {name: f"lattice_client.{module}" for name, module in vars(lattice_client)["_MODULES"].items()} == places
    assert lattice_client.__all__ == sorted(["context", *places])
    assert all(hasattr(lattice_client, name) for name in lattice_client.__all__)
    assert {*lattice_client.__all__} <= {*dir(lattice_client)}
    assert not hasattr(lattice_client, "nothing")


# Coroutines of users, each of which is answered when it ends.
OWN_TASKS = {"lattice_worker.runner.coroutines.aio:_start"}
MAKERS = ("create_task", "ensure_future")


def test_each_background_task_has_an_owner_that_learns_of_its_failure() -> None:
    bare = {
        f"{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}:{function}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "background.py"
        for function in _bare_tasks(path.read_text())
    }
    assert bare == OWN_TASKS


@pytest.mark.parametrize(
    ("body", "is_bare"),
    [
        ("asyncio.create_task(work())", True),
        ("task = asyncio.create_task(work())", True),
        ("self.tasks = list(map(asyncio.create_task, works))", True),
        ("task = loop.create_task(work()); await asyncio.wait({task})", True),
        ("task = loop.create_task(work()); await asyncio.gather(task, return_exceptions=True)", True),
        ("task = loop.create_task(work()); await asyncio.wait({task}); task.result()", False),
        ("tasks = [asyncio.ensure_future(one) for one in works]; await asyncio.gather(*tasks)", False),
        ("return await asyncio.shield(asyncio.create_task(work()))", False),
        ("async with asyncio.TaskGroup() as group: group.create_task(work())", False),
    ],
)
def test_a_bare_task_is_one_that_its_function_does_not_await(body: str, is_bare: bool) -> None:
    assert list(_bare_tasks(f"async def run():\n {body}")) == ["run"] * is_bare


def _bare_tasks(text: str) -> Iterator[str]:
    """Yield the functions that make a task with `asyncio`, and neither await it nor have it in a group."""
    if not any(maker in text for maker in MAKERS):
        return
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        nodes = list(_own_nodes(function))
        awaits = [node for node in nodes if isinstance(node, ast.Await) and not _drops_errors(node)]
        owned = {id(node) for await_ in awaits for node in ast.walk(await_)}
        names = {name for await_ in awaits for name in _names(await_)} | {
            name for node in nodes if isinstance(node, ast.Attribute) and node.attr == "result" for name in _names(node)
        }
        for node in nodes:
            if isinstance(node, ast.Assign) and names.intersection(*map(_names, node.targets)):
                owned.update(map(id, ast.walk(node.value)))
            elif isinstance(node, ast.AsyncWith) and "TaskGroup" in ast.unparse(node.items[0]):
                owned.update(map(id, ast.walk(node)))
        yield from (
            function.name
            for node in nodes
            if isinstance(node, ast.Attribute) and node.attr in MAKERS and id(node) not in owned
        )


def _drops_errors(node: ast.Await) -> bool:
    """Whether an expression waits for tasks without raising their exceptions."""
    text = ast.unparse(node)
    return text.startswith("await asyncio.wait(") or "return_exceptions" in text


def _names(node: ast.AST) -> set[str]:
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


def _own_nodes(parent: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below a function, without those of functions in it."""
    for node in ast.iter_child_nodes(parent):
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _own_nodes(node)
