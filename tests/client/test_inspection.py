"""`lattice runs show`, `logs` and `timeline`, against a real server, for people, in a pipe and for programs."""

import json
import re
import signal
import sys
from pathlib import Path

import grpc
import pytest
from lattice.v1 import results_pb2, results_pb2_grpc

from lattice_client import LatticeClient, Run, TaskFailedError, task
from tests.client.shell import WAIT_S, at_terminal, call, ended, fail, greet, terminal
from tests.client.test_timeline_files import check_trace

pytestmark = pytest.mark.slow


@task
def talk(name: str) -> str:
    print(f"out {name}\nagain {name}")
    print(f"err {name}", file=sys.stderr)
    return name


@task(retries=1, retry_backoff=0.01)
def flaky(folder: str) -> str:
    marker = Path(folder) / "tried"
    print("attempt", 2 if marker.exists() else 1)
    if not marker.exists():
        marker.touch()
        raise OSError("the first time")
    return "done"


@task
def numbers() -> list[int]:
    return [1, 2]


@task
def speak(number: int) -> int:
    print("number", number)
    return number


@task(cpu=2)
def wide() -> None:
    pass


@task(retries=1, retry_backoff=0)
def picky(number: int) -> int:
    if number == 2:
        raise ValueError("two")
    return number


@task
def total(numbers: list[int]) -> int:
    return sum(numbers)


def cells(text: str) -> list[list[str]]:
    return [line.split("\t") for line in text.splitlines()]


def test_logs_in_a_pipe_name_task_attempt_and_stream(address: str, client: LatticeClient) -> None:
    run = ended(client, talk, {"name": "x"})
    found = cells(call(address, "runs", "logs", run).stdout)
    assert sorted(found) == [
        ["talk", "1", "stderr", "err x"],
        ["talk", "1", "stdout", "again x"],
        ["talk", "1", "stdout", "out x"],
    ]
    chosen = call(address, "runs", "logs", run, "talk", "--stream", "stderr").stdout
    assert chosen == "talk\t1\tstderr\terr x\n"


def test_logs_have_all_attempts_or_one(address: str, client: LatticeClient, tmp_path: Path) -> None:
    run = ended(client, flaky, {"folder": str(tmp_path)})
    assert [row[1::2] for row in cells(call(address, "runs", "logs", run).stdout)] == [
        ["1", "attempt 1"],
        ["2", "attempt 2"],
    ]
    assert call(address, "runs", "logs", run, "--attempt", "2").stdout == "flaky\t2\tstdout\tattempt 2\n"


def test_logs_of_a_mapped_task_are_those_of_its_items(address: str, client: LatticeClient) -> None:
    workflow = client.create_workflow()
    workflow.map(speak, workflow.add_task(numbers).output)
    run = workflow.run()
    run.result(timeout=WAIT_S)
    found = cells(call(address, "runs", "logs", run, "speak").stdout)
    assert sorted(found) == [["speak[0]", "1", "stdout", "number 1"], ["speak[1]", "1", "stdout", "number 2"]]
    assert call(address, "runs", "logs", run, "speak[1]").stdout == "speak[1]\t1\tstdout\tnumber 2\n"


def test_logs_in_json_can_be_resumed(address: str, client: LatticeClient) -> None:
    run = ended(client, talk, {"name": "x"})
    lines = [json.loads(line) for line in call(address, "runs", "logs", run, "--json").stdout.splitlines()]
    assert len(lines) == 3
    for number, line in enumerate(lines, 1):
        after = call(address, "runs", "logs", run, "--json", "--after", str(line["resume_after"])).stdout
        later = [json.loads(found)["text"] for found in after.splitlines()]
        assert {found["text"] for found in lines[number:]} <= set(later)
    assert set(lines[0]) == {
        *("sequence", "resume_after", "time_s", "task_id", "display_name", "attempt", "stream", "text"),
        "is_truncation_notice",
    }


def test_logs_end_at_once_when_the_run_goes_on(address: str, waiting: Run) -> None:
    for event in waiting.events(timeout=WAIT_S):
        if event.type == "task_log":
            break
    assert call(address, "runs", "logs", waiting).stdout == "gated\t1\tstdout\twaiting at the gate\n"
    # All events so far are filtered out: the server still says that they were all.
    assert call(address, "runs", "logs", waiting, "greet", "--after", "1").stdout == ""
    assert waiting.status() == "running"


def test_a_filtered_reader_learns_that_it_has_all_earlier_events(address: str, waiting: Run) -> None:
    newest = next(event.sequence for event in waiting.events(timeout=WAIT_S) if event.type == "task_log")
    request = results_pb2.WatchRunRequest(run_id=waiting, after_sequence=1, task_ids=["greet"], exclude_logs=True)
    with grpc.insecure_channel(address) as channel:
        stream = results_pb2_grpc.ResultsServiceStub(channel).WatchRun(request, timeout=WAIT_S)
        first = next(stream)
        stream.cancel()
    assert (list(first.events), first.complete) == ([], False)
    assert first.sequence >= newest


def test_followed_logs_continue_to_the_end_of_the_run(address: str, waiting: Run, gate: Path) -> None:
    with terminal(address, "runs", "logs", "--follow", waiting) as shown:
        shown.read_until("gated | waiting at the gate")
        gate.write_text("you")
        assert shown.read_all() == 0
    assert shown.text.count("| hello you\n") == 20


def test_interrupted_logs_name_the_event_to_continue_after(address: str, waiting: Run, gate: Path) -> None:
    with terminal(address, "runs", "logs", "--follow", waiting) as shown:
        shown.read_until("gated | waiting at the gate")
        shown.process.send_signal(signal.SIGINT)
        assert shown.read_all() == 128 + signal.SIGINT
    assert "Traceback" not in shown.text
    hint = shown.text.rpartition(f"`lattice runs logs {waiting} --after ")[2]
    after = hint.partition("`")[0]
    gate.write_text("you")
    waiting.result(timeout=WAIT_S)
    later = call(address, "runs", "logs", waiting, "--after", after).stdout
    assert "waiting at the gate" not in later
    assert later.count("hello you\n") == 20


@pytest.mark.parametrize("command", [["logs"], ["timeline"], ["show"]])
def test_inspection_prints_one_line_when_the_run_is_unknown(address: str, command: list[str]) -> None:
    done = call(address, "runs", *command, "nowhere")
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", "Error: there is no run 'nowhere'\n")


def test_logs_print_one_line_when_the_task_is_unknown(address: str, client: LatticeClient) -> None:
    done = call(address, "runs", "logs", ended(client, greet, {"name": "x"}), "nobody")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert "nobody" in done.stderr
    assert done.stderr.count("\n") == 1


def test_show_names_the_line_of_code_that_failed(address: str, client: LatticeClient) -> None:
    shown = call(address, "runs", "show", ended(client, fail, {"name": "x"})).stdout
    assert "\n  fail: attempt 1 on node local\n    USER_ERROR: LookupError: nothing [bold]there[/bold]\n" in shown
    assert ', in fail: raise LookupError("nothing [bold]there[/bold]")\n' in shown


def test_show_names_the_item_that_failed_in_place_of_its_map(address: str, client: LatticeClient) -> None:
    workflow = client.create_workflow(failure_policy="finish_independent")
    mapped = workflow.map(picky, workflow.add_task(numbers).output)
    workflow.add_task(picky, {"number": 3}, task_id="three")
    workflow.add_task(total, {"numbers": mapped.output})
    run = workflow.run()
    with pytest.raises(TaskFailedError):
        run.result(timeout=WAIT_S)
    shown = call(address, "runs", "show", run).stdout
    assert re.findall(r"^  (\S+: attempt \d+) on node \S+$", shown, re.MULTILINE) == ["picky[1]: attempt 2"]
    assert f"lattice runs show {run}" not in shown


def test_show_explains_why_tasks_wait(address: str, client: LatticeClient, waiting: Run) -> None:
    workflow = client.create_workflow()
    workflow.add_task(wide)
    workflow.add_task(wide)
    run = workflow.run()
    shown = call(address, "runs", "show", run).stdout
    document = json.loads(call(address, "runs", "show", "--json", run).stdout)
    client.cancel_run(run)
    waits = shown.partition("\nwaiting:\n")[2]
    assert waits.startswith("  wide")
    assert "; 2 of wide are queued\n" in waits
    assert "    resources: node 'local': cpu: 2 wanted, 1 free" in waits
    assert document["waiting"][0]["queued_of_function"] == 2
    assert "WAIT_KIND_RESOURCES" in [reason["kind"] for reason in document["waiting"][0]["reasons"]]


def test_show_draws_the_graph_at_a_terminal(address: str, waiting: Run) -> None:
    shown = at_terminal(address, "runs", "show", waiting).stdout
    assert "\ngated" in shown
    assert shown.count("\u251c\u2500 greet") == 19
    assert shown.count("\u2514\u2500 greet-20") == 1


def test_show_has_a_row_for_each_function_of_a_large_run(address: str, client: LatticeClient) -> None:
    workflow = client.create_workflow()
    for number in range(60):
        workflow.add_task(greet, {"name": str(number)})
    run = workflow.run()
    run.result(timeout=WAIT_S)
    shown = at_terminal(address, "runs", "show", run).stdout
    assert "greet \u00d7 60" in shown
    assert "60 succeeded" in shown
    assert "60 tasks in 1 rows; --all shows every task" in shown
    assert "greet-60" in at_terminal(address, "runs", "show", "--all", run).stdout


def test_json_of_show_has_the_graph(address: str, waiting: Run) -> None:
    document = json.loads(call(address, "runs", "show", "--json", waiting).stdout)
    assert [found["predecessor_task_ids"] for found in document["tasks"]] == [[], *[["gated"]] * 20]
    assert document["tasks"][0]["function_name"] == "gated"


def test_timeline_shows_attempts_nodes_and_functions(address: str, client: LatticeClient, tmp_path: Path) -> None:
    run = ended(client, flaky, {"folder": str(tmp_path)})
    shown = call(address, "runs", "timeline", run).stdout
    _, path, attempts, nodes, functions = shown.split("\n\n")
    assert path.startswith("critical path: 1 task in ")
    assert [row[:4] + row[7:] for row in cells(attempts)[1:]] == [
        ["flaky", "1", "failed", "local", "yes"],
        ["flaky", "2", "succeeded", "local", "yes"],
    ]
    assert cells(nodes)[1][:3] == ["local", "2", "1"]
    assert cells(functions)[1][:3] == ["flaky", "2", "1"]
    document = json.loads(call(address, "runs", "timeline", "--json", run).stdout)
    assert document["critical_path"] == ["flaky"]
    assert [found["outcome"] for found in document["attempts"]] == ["failed", "succeeded"]
    assert all(found["ran_s"] >= 0 for found in document["attempts"])


def test_timeline_draws_bars_at_a_terminal(address: str, client: LatticeClient) -> None:
    shown = at_terminal(address, "runs", "timeline", ended(client, greet, {"name": "x"})).stdout
    assert "\u2588" in shown
    assert "* greet" in shown
    assert max(len(line) for line in shown.splitlines() if "\u2588" in line) <= 80


def test_timeline_shows_queued_tasks_when_the_run_is_active(address: str, client: LatticeClient, waiting: Run) -> None:
    workflow = client.create_workflow()
    workflow.add_task(wide)
    run = workflow.run()
    document = json.loads(call(address, "runs", "timeline", "--json", run).stdout)
    client.cancel_run(run)
    assert [(found["task_id"], found["outcome"]) for found in document["attempts"]] == [("wide", "queued")]


def test_timeline_writes_files(address: str, client: LatticeClient, tmp_path: Path) -> None:
    run = ended(client, greet, {"name": "x"})
    page, trace = tmp_path / "page.html", tmp_path / "trace.json"
    done = call(address, "runs", "timeline", run, "--html", str(page), "--chrome-trace", str(trace))
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr == f"Wrote {trace}\nWrote {page}\n"
    check_trace(json.loads(trace.read_text()))
    assert page.read_text().startswith("<!doctype html>")
    check_trace(json.loads(call(address, "runs", "timeline", run, "--chrome-trace", "-").stdout))
    done = call(address, "runs", "timeline", run, "--html", str(tmp_path / "none" / "page.html"))
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
