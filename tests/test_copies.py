"""Code that packages have copies of, since they share the contract and nothing else: the copies do the same."""

import ast
import inspect
import textwrap
from types import ModuleType
from typing import Any

import pytest

from lattice_client import background as of_client
from lattice_client.cli import options
from lattice_server import background as of_server
from lattice_server import flags
from lattice_server.engine.stores import spare_keeper as spares_of_server
from lattice_worker import background as of_worker
from lattice_worker.runner.encoding import spare_files
from lattice_worker.store import spare_keeper as spares_of_worker

# Statements of a copy that the others do not need: the client's callers keep their tasks.
OWN = {"_running.discard(task)"}


def body_of(function: Any) -> list[str]:
    """Return the statements of a function without its docstring and those of `OWN`."""
    (found,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(found, ast.FunctionDef)
    statements = found.body[1:] if ast.get_docstring(found) else found.body
    return [text for statement in statements if (text := ast.unparse(statement)) not in OWN]


@pytest.mark.parametrize("name", ["_end", "only_log"])
@pytest.mark.parametrize("copy", [of_server, of_client], ids=["server", "client"])
def test_background_task_ends_alike_in_all_packages(copy: ModuleType, name: str) -> None:
    assert body_of(getattr(copy, name)) == body_of(getattr(of_worker, name))


def test_numbers_in_options_are_read_alike_by_client_and_server() -> None:
    assert inspect.getsource(options.FiniteRange) == inspect.getsource(flags.FiniteRange)


def test_spares_of_server_and_worker_are_the_same_files() -> None:
    assert spares_of_server.SPARES == spare_files.SPARES
    assert spares_of_server.MIN_SPARE_BYTES == spare_files.MIN_SPARE_BYTES
    assert spares_of_server.IDLE_S == spares_of_worker.IDLE_S


def test_server_and_worker_find_an_unused_file_and_a_store_in_memory_alike() -> None:
    unprefixed = [text.replace("contextlib.", "") for text in body_of(spares_of_worker.is_in_memory)]
    assert body_of(spares_of_server._is_in_memory) == unprefixed
    (lease,) = (text for text in body_of(spare_files.is_unused) if "F_SETLEASE" in text)
    of_server = " ".join(" ".join(body_of(spares_of_server._is_unused)).split())
    for line in lease.splitlines():
        assert line.strip() in of_server
