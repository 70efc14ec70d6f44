"""`lattice runs watch`, for people at a terminal, in a pipe, and for programs."""

import json
import operator
import signal
from pathlib import Path
from typing import Any

import pytest

from lattice_client import LatticeClient, Run, TaskFailedError, task
from tests.client.shell import call, ended, fail, greet, terminal


class Unreadable:
    """A value that cannot be read where it arrives."""

    def __reduce__(self) -> Any:
        return operator.truediv, (1, 0)


@task
def strange() -> Any:
    looped: list[Any] = []
    looped.append(looped)
    return {"bytes": b"\xff", (1, 2): {3}, "nan": float("nan"), "looped": looped, "large": 10**5000}


@task
def unreadable() -> Any:
    return Unreadable()


def test_live_view_shows_running_tasks_until_the_run_succeeds(address: str, waiting: Run, gate: Path) -> None:
    with terminal(address, "runs", "watch", waiting, lines=12) as shown:
        shown.read_until("gated | waiting at the gate")
        shown.read_until("waiting  running  0/21 tasks")
        gate.write_text("you")
        assert shown.read_all() == 0
    assert shown.text.count("| hello you\n") == 20
    assert "waiting  succeeded  21/21 tasks" in shown.text
    assert "... and 13 more" in shown.text.rpartition("waiting  succeeded")[2]


def test_a_live_view_ends_with_the_failure(address: str, client: LatticeClient) -> None:
    run = ended(client, fail, {"name": "x"})
    with terminal(address, "runs", "watch", run) as shown:
        assert shown.read_all() == 1
    assert "fail | about to fail" in shown.text
    assert "the name  failed  0/1 tasks" in shown.text
    end = shown.text.rpartition("the name  failed")[2]
    assert f"Error: task 'fail' of run '{run}' failed (USER_ERROR): LookupError: nothing [bold]there" in end
    assert "Remote traceback:" in end
    assert ", in fail\n" in end


def test_interrupt_ends_the_live_view_and_not_the_run(address: str, waiting: Run) -> None:
    with terminal(address, "runs", "watch", waiting) as shown:
        shown.read_until("waiting at the gate")
        shown.process.send_signal(signal.SIGINT)
        assert shown.read_all() == 128 + signal.SIGINT
    assert "The run continues" in shown.text
    assert "Traceback" not in shown.text
    assert waiting.status() == "running"


def test_a_piped_view_is_a_line_an_event_and_a_line_of_output(address: str, client: LatticeClient) -> None:
    run = ended(client, greet, {"name": "you"})
    done = call(address, "runs", "watch", run)
    assert done.exit_code == 0
    assert [line.split(maxsplit=1)[1] for line in done.stdout.splitlines()] == [
        "run_started",
        "task_started    greet",
        "task_log        greet                hello you",
        "task_succeeded  greet                {'result': 'you'}",
        "run_finished",
    ]
    workflow = client.create_workflow()
    workflow.add_task(greet, {"name": "you"}, task_id="first")
    lines = call(address, "runs", "watch", workflow.run()).stdout.splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines if "task_log" in line] == [
        "task_log        greet (first)        hello you"
    ]
    run = ended(client, fail, {"name": "x"})
    done = call(address, "runs", "watch", run)
    assert done.exit_code == 1
    assert "task_failed     fail                 USER_ERROR: nothing [bold]there[/bold]\n" in done.stdout
    assert "Remote traceback:" in done.stderr


@pytest.mark.parametrize("definition", [strange, unreadable])
@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["plain", "json"])
def test_no_value_ends_a_view(address: str, client: LatticeClient, definition: Any, flags: list[str]) -> None:
    workflow = client.create_workflow()
    workflow.add_task(definition)
    done = call(address, "runs", "watch", workflow.run(), *flags)
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) == 4
    if flags:
        events = [json.loads(line, parse_constant=pytest.fail) for line in done.stdout.splitlines()]
        assert [event["sequence"] for event in events] == [1, 2, 3, 4]
        assert events[-1]["data"]["state"] == "succeeded"


def test_command_exits_with_1_when_the_run_failed(address: str, client: LatticeClient) -> None:
    run = ended(client, fail, {"name": "x"})
    done = call(address, "runs", "watch", "--json", run)
    assert done.exit_code == 1
    assert json.loads(done.stdout.splitlines()[-1])["data"]["state"] == "failed"


@pytest.mark.parametrize("command", ["watch", "show"])
def test_an_error_that_a_command_shows_names_the_task_by_its_id_and_its_name(
    address: str, client: LatticeClient, command: str
) -> None:
    workflow = client.create_workflow()
    workflow.add_task(fail, {"name": "x"}, task_name="the one that fails")
    run = workflow.run()
    with pytest.raises(TaskFailedError):
        run.result()
    assert "task 'fail' ('the one that fails') of run" in call(address, "runs", command, run).output


def test_a_cancelled_run_is_a_failure_of_the_view(address: str, waiting: Run) -> None:
    assert "Cancelling" in call(address, "runs", "cancel", waiting).stdout
    done = call(address, "runs", "watch", waiting)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"Error: run '{waiting}' was cancelled")
    assert call(address, "runs", "cancel", waiting).stdout == f"Run {waiting} is cancelled.\n"
