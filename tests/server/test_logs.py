"""Log lines: one line for each record, with the ids of its run, task or worker."""

import ast
import json
import logging
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_client import LatticeClient, RunError, UnauthenticatedError, secret, task
from lattice_client import logs as client_logs
from lattice_server import logs
from lattice_server.core.messages import TaskLogged, TaskRetrying
from lattice_server.core.model import Failure, FailureKind
from lattice_server.engine.runs.run_logging import TaskOutputLog
from lattice_worker import logs as worker_logs
from tests.commands import START

HOSTILE = "ok\r\n2026-01-01 00:00:00,000 ERROR forged: \x1b[2J\u202e\u2028 \ud83d end"


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, put back afterwards."""
    found = logging.getLogger()
    before, level = found.handlers[:], found.level
    yield found
    found.handlers[:] = before
    found.setLevel(level)


def written(form: str, message: str, error: BaseException | None = None, **named: object) -> str:
    """Return a formatted record. It is not logged, since pytest cannot report half a character."""
    formatter = logs.JsonLines() if form == "json" else logs.TextLines()
    raised = None if error is None else (type(error), error, error.__traceback__)
    record = logging.getLogger("lattice.test").makeRecord(
        "lattice.test", logging.INFO, "file.py", 1, message, (), raised, extra=named
    )
    return formatter.format(record)


def test_log_modules_of_the_packages_are_equal() -> None:
    # They share nothing but the contract.
    first, *others = (
        ast.unparse(ast.parse(Path(str(m.__file__)).read_text())) for m in (logs, worker_logs, client_logs)
    )
    assert others == [first, first]


@given(st.text(st.characters()), st.text(st.characters()))
def test_record_is_one_printable_line_when_its_text_has_control_characters(message: str, run_id: str) -> None:
    for form in logs.FORMATS:
        line = written(form, message, run_id=run_id, task_id="", attempt=3)
        assert line.isprintable()
        assert "task_id" not in line
    found = json.loads(line)
    assert (found["message"], found.get("run_id", "")) == (message, run_id)
    assert found["attempt"] == 3


def test_a_line_has_its_time_level_logger_and_fields() -> None:
    found = json.loads(written("json", HOSTILE, run_id="r", session_id="s"))
    assert datetime.fromisoformat(found.pop("time")).tzinfo is not None
    assert found == {"level": "INFO", "logger": "lattice.test", "message": HOSTILE, "run_id": "r", "session_id": "s"}
    line = written("text", HOSTILE, run_id="r=1", node_id="a b")
    assert line.partition(" INFO ")[2] == (
        "lattice.test: ok\\r\\n2026-01-01 00:00:00,000 ERROR forged: \\x1b[2J\\u202e\\u2028 \\ud83d end"
        " run_id='r=1' node_id='a b'"
    )


def test_lines_of_a_traceback_are_indented() -> None:
    error = ValueError(HOSTILE)
    first, *others = written("text", "broken", error).split("\n")
    assert first.endswith("INFO lattice.test: broken")
    assert others
    assert all(line.startswith("    ") and line.isprintable() for line in others)
    assert json.loads(written("json", "broken", error))["exception"].endswith(HOSTILE)


@pytest.mark.parametrize("form", logs.FORMATS)
def test_record_is_short_when_its_texts_are_huge(form: str) -> None:
    error = ValueError("first " + "\n" * 1_000_000 + " last")
    line = written(form, "begin " + "m" * 1_000_000 + " end", error, run_id="r" * 1_000_000)
    assert len(line) < 60_000
    assert all(
        text in line for text in ("begin m", "m end", "ValueError: first", " last", "999744 characters left out")
    )


def test_handler_is_replaced_when_logging_is_set_up_again(root: logging.Logger) -> None:
    own = logging.NullHandler()
    root.addHandler(own)
    first = logs.set_up("text", "info")
    second = logs.set_up("json", "error")
    assert first not in root.handlers
    assert {own, second} <= set(root.handlers)
    assert root.level == logging.ERROR


@task
def fail() -> None:
    print("what-the-user-printed")
    raise ValueError("what-the-user-wrote")


def speak(key: str) -> None:
    import os
    import sys

    print(f"one {key}\ntwo\x1b[2J", os.environ["KEY"])
    print("three", file=sys.stderr)


@pytest.mark.slow
def test_a_server_and_its_worker_log_json_with_ids_and_no_secrets(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-token-of-callers-1234567890\n")
    (tmp_path / "lattice.toml").write_text('log_level = "debug"\n')
    command = [*START, "--head", "--port", "0", "--executor", "local", "--num-cpus", "1"]
    command += ["--token-file", str(tmp_path / "token"), "--config", str(tmp_path / "lattice.toml")]
    with (tmp_path / "log").open("w") as file:
        server = subprocess.Popen([*command, "--log-format", "json"], stdout=subprocess.PIPE, stderr=file, text=True)
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip().rpartition(" ")[2]
            with (
                LatticeClient(address, token="another-token-0987654321") as stranger,
                pytest.raises(UnauthenticatedError),
            ):
                stranger.list_runs()
            with LatticeClient(address, token="a-token-of-callers-1234567890") as client:
                workflow = client.create_workflow()
                made = workflow.add_task(fail, {}, "t")
                run = workflow.run()
                with pytest.raises(RunError):
                    run.result()
        finally:
            server.terminate()
            server.wait(30)
    text = (tmp_path / "log").read_text()
    assert "what-the-user-wrote" not in text
    assert "what-the-user-printed" not in text, "only `--task-output log` has it logged"
    assert "token-of-callers" not in text
    assert "another-token" not in text
    records = [json.loads(line) for line in text.splitlines()]
    about = {record["message"]: record for record in records if record.get("run_id") == run.run_id}
    assert about["the task failed: user_error ValueError"].items() >= {"task_id": made.task_id, "attempt": 1}.items()
    assert about["the run ended as failed: user_error"]["level"] == "INFO"
    assert about["the attempt starts"].keys() >= {"lease_id", "task_id", "attempt"}
    assert any(r["message"] == "the worker joined" and r["session_id"] and r["node_id"] == "local" for r in records)


@pytest.mark.slow
def test_printed_text_is_logged_when_the_operator_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "canary-of-a-secret")
    command = [*START, "--head", "--port", "0", "--executor", "local", "--num-cpus", "1", "--log-format", "json"]
    with (tmp_path / "log").open("w") as file:
        server = subprocess.Popen([*command, "--task-output", "log"], stdout=subprocess.PIPE, stderr=file, text=True)
        try:
            assert server.stdout is not None
            with LatticeClient(server.stdout.readline().strip().rpartition(" ")[2]) as client:
                workflow = client.create_workflow()
                workflow.add_task(task(env={"KEY": secret("KEY")})(speak), {"key": "x"})
                run = workflow.run()
                run.result(timeout=60)
        finally:
            server.terminate()
            server.wait(30)
    records = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    found = {r["message"]: r for r in records if r["logger"].startswith("lattice_server.task.")}
    assert list(found) == ["one x", "two\x1b[2J ***", "three"]
    ids = {"run_id": run.run_id, "task_id": "speak", "attempt": 1, "node_id": "local"}
    assert [{name: record.get(name) for name in ids} for record in found.values()] == [ids] * 3
    assert [record["logger"].rpartition(".")[2] for record in found.values()] == ["stdout", "stdout", "stderr"]


def test_the_last_line_of_an_attempt_is_logged_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    tasks = {"t": SimpleNamespace(node_id="n")}
    entry: Any = SimpleNamespace(key="r", run_id="r", trace_id="", run=SimpleNamespace(tasks=tasks))
    told = TaskOutputLog()
    told.note(entry, TaskLogged("r", "t", 1, is_error=False, text="one\ntwo", is_truncated=False))
    assert caplog.messages == ["one"]
    failure = Failure(FailureKind.USER_ERROR, "")
    told.note(entry, TaskRetrying("r", "t", 1, failure, 0.0))
    told.note(entry, TaskLogged("r", "t", 2, is_error=False, text="three\n", is_truncated=False))
    assert [(record.message, vars(record)["attempt"]) for record in caplog.records] == [
        ("one", 1),
        ("two", 1),
        ("three", 2),
    ]
