"""Modules that a worker imports before the processes of tasks are forked."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.worker.head import TIMEOUT_S, Pair, pair

pytestmark = pytest.mark.slow

MODULE = "wave"  # Of the standard library, and imported by nothing here.


def imported(name: str) -> bool:

    return name in sys.modules


def value_of(function: Callable[..., Any], folder: Path, **inputs: Any) -> Any:
    """Return the result of a function in a worker of its own."""

    async def scene() -> Any:
        both: Pair
        async with pair(folder) as both, asyncio.timeout(TIMEOUT_S):
            both.stream.assign("a", function, inputs=inputs)
            return await both.stream.value("a")

    return asyncio.run(scene())


@pytest.mark.parametrize(("preload", "expected"), [(f"{MODULE}, email.mime.text", True), ("", False)])
def test_tasks_find_modules_imported_that_the_worker_names(
    preload: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATTICE_PRELOAD", preload)
    assert value_of(imported, tmp_path, name=MODULE) is expected


def drawn() -> tuple[int, float, float]:
    import os
    import random
    import time

    assert "numpy.random" in sys.modules

    import numpy as np

    time.sleep(0.5)  # So that another process takes the other task.
    return os.getpid(), random.random(), np.random.random()


def test_each_process_has_seeds_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATTICE_PRELOAD", "numpy.random")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")  # Else its import starts threads.

    async def scene() -> list[Any]:
        both: Pair
        async with pair(tmp_path) as both, asyncio.timeout(TIMEOUT_S):
            for slot, name in enumerate("ab"):
                both.stream.assign(name, drawn, slot=slot)
            return [await both.stream.value(name) for name in "ab"]

    one, other = asyncio.run(scene())
    assert all(mine != its for mine, its in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (
            "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
            "starts threads",
        ),
        ("raise SystemExit('no licence')", "SystemExit: no licence"),
        ("import grpc", "imports grpc"),
    ],
    ids=["thread", "exit", "grpc"],
)
def test_tasks_run_without_a_module_whose_import_cannot_be_forked(
    code: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "unfit.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("LATTICE_PRELOAD", "unfit")
    assert value_of(imported, tmp_path / "store", name="unfit") is False
    assert "nothing is imported before tasks start: import of 'unfit'" in (said := capfd.readouterr().err)
    assert problem in said


@pytest.mark.parametrize("name", ["no_such_module", "email.no_such_module", "wave; os", "a..b", "."])
def test_tasks_run_without_a_module_that_is_not_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LATTICE_PRELOAD", f"{MODULE},{name}")
    assert value_of(imported, tmp_path / "store", name=MODULE) is False
    assert f"nothing is imported before tasks start: import of {name!r}" in capfd.readouterr().err
