"""The command `lattice`, as people and programs use it, against a real server."""

import json
import re
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pathlib import Path

import pytest
from click.testing import CliRunner

from lattice_client import LatticeClient, Run
from lattice_client.cli import groups
from lattice_client.cli.main import main
from lattice_server.flags import OF_HEAD, OF_WORKER
from tests.client.shell import WAIT_S, call, ended, fail, greet, terminal
from tests.commands import LATTICE

pytestmark = pytest.mark.slow

NOBODY = "127.0.0.1:1"


def test_cancel_reports_the_state_when_the_run_has_ended(address: str, client: LatticeClient) -> None:
    run = ended(client, greet, {"name": "you"})
    assert call(address, "runs", "cancel", run).stdout == f"Run {run} had already succeeded.\n"
    assert json.loads(call(address, "runs", "cancel", "--json", run).stdout)["state"] == "RUN_STATE_SUCCEEDED"


def test_a_run_is_shown_with_its_tasks(address: str, waiting: Run, gate: Path) -> None:
    done = call(address, "runs", "show", waiting)
    head, _, tasks = done.stdout.partition("\n\n")
    assert head.splitlines()[1].split("\t")[:4] == [waiting, "waiting", "running", "0/21"]
    _, _, second, *_ = (line.split("\t") for line in tasks.splitlines())
    assert second[:4] == ["greet", "greet", "blocked", ""]
    gate.write_text("you")
    waiting.result(timeout=WAIT_S)
    document = json.loads(call(address, "runs", "show", "--json", waiting).stdout)
    assert document["state"] == "RUN_STATE_SUCCEEDED"
    assert document["task_counts"]["failed"] == 0
    assert [found["state"] for found in document["tasks"]] == ["TASK_STATE_SUCCEEDED"] * 21


def test_an_open_run_is_shown_as_open(address: str, client: LatticeClient) -> None:
    with client.open_run("steps") as run:
        rows = [line.split("\t") for line in call(address, "runs", "list").stdout.splitlines()]
        assert [row[1:4] for row in rows if row[0] == run] == [["steps", "running, open", "0/0"]]
        assert "running, open" in call(address, "runs", "show", run).stdout
    assert "succeeded" in call(address, "runs", "show", run).stdout


def test_a_failed_run_is_shown_with_its_traceback(address: str, client: LatticeClient) -> None:
    done = call(address, "runs", "show", ended(client, fail, {"name": "x"}))
    assert done.exit_code == 0
    assert done.stdout.endswith("LookupError: nothing [bold]there[/bold]\n")
    assert "Remote traceback:" in done.stdout


def test_tables_are_whole_at_a_terminal_and_lines_of_cells_in_a_pipe(address: str, client: LatticeClient) -> None:
    run = ended(client, greet, {"name": "you"})
    heading, *cells = call(address, "runs", "list", "--limit", "1").stdout.splitlines()
    assert heading == "run\tname\tstate\ttasks\tsince (UTC)"
    assert len(cells) == 1
    assert cells[0].split("\t")[:4] == [run, "the name", "succeeded", "1/1"]
    assert json.loads(call(address, "runs", "list", "--limit", "1", "--json").stdout)["run_id"] == run
    with terminal(address, "runs", "list") as shown:
        assert shown.read_all() == 0
    row = next(line for line in shown.text.splitlines() if line.startswith(run))
    assert row.split()[1:5] == ["the", "name", "succeeded", "1/1"]


def test_commands_replace_control_characters_when_a_name_has_them(address: str, client: LatticeClient) -> None:
    workflow = client.create_workflow("\x1b[2Jtwo\nlines\x9b")
    workflow.add_task(greet, {"name": "you"})
    run = workflow.run()
    run.result(timeout=WAIT_S)
    shown = "\N{REPLACEMENT CHARACTER}[2Jtwo lines\N{REPLACEMENT CHARACTER}"
    listed = call(address, "runs", "list", "--limit", "1").stdout.splitlines()[1]
    assert listed.split("\t")[:2] == [run, shown]
    with terminal(address, "runs", "list", "--limit", "1") as seen:
        assert seen.read_all() == 0
    assert shown in seen.text


def test_the_server_and_its_nodes_are_shown(address: str, client: LatticeClient) -> None:
    ended(client, greet, {"name": "you"})  # Its node has joined then.
    facts = dict(line.split("\t") for line in call(address, "status").stdout.splitlines())
    assert facts["server"] == address
    assert facts["executor"] == "local"
    assert json.loads(call(address, "status", "--json").stdout)["queued_tasks"] == 0
    assert "\nlocal\tready\t" in call(address, "nodes").stdout
    assert json.loads(call(address, "nodes", "--json").stdout)["state"] == "NODE_STATE_READY"
    for command in ("status", "nodes"):
        with terminal(address, command) as shown:
            assert shown.read_all() == 0
        assert "local" in shown.text


VERBS = ("show", "watch", "cancel", "retry", "logs", "timeline")
COMMANDS = [["status"], ["nodes"], ["runs", "list"], *(["runs", verb, "x"] for verb in VERBS)]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_prints_one_line_when_no_server_listens(command: list[str]) -> None:
    done = call(NOBODY, *command)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"Error: no Lattice server answers at {NOBODY}: start one with")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyError("x\x1b"), "Error: a bug of Lattice, KeyError: 'x\\x1b'; `lattice --log-level debug` with the same"),
        (PermissionError(13, "Permission denied", "f"), "Error: [Errno 13] Permission denied: 'f'\n"),
    ],
)
def test_command_prints_one_line_when_it_meets_an_unexpected_error(
    monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("lattice_client.cli.cluster.connected", broken)
    done = call(NOBODY, "status")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith(text)
    assert done.stderr.count("\n") == 1
    monkeypatch.setattr(groups.log, "isEnabledFor", lambda level: True)
    assert call(NOBODY, "status").exception is error


@pytest.mark.parametrize("verb", ["show", "watch", "cancel"])
def test_command_prints_one_line_when_the_run_is_unknown(address: str, verb: str) -> None:
    done = call(address, "runs", verb, "nowhere")
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", "Error: there is no run 'nowhere'\n")


def test_commands_of_other_packages_are_offered() -> None:
    assert re.findall(r"^  (\w+) ", CliRunner().invoke(main, ["--help"]).stdout, re.MULTILINE) == [
        "doctor",
        "journal",
        "llm",
        "nodes",
        "run",
        "runs",
        "services",
        "start",
        "status",
        "stop",
        "token",
    ]


def test_commands_work_when_another_entry_point_is_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = EntryPoint("token", "lattice_none:command", groups.ENTRY_POINTS)
    found = EntryPoints([broken])
    monkeypatch.setattr(groups, "entry_points", found.select)
    assert re.search(r"^  token +Cannot be loaded", CliRunner().invoke(main, ["--help"]).stdout, re.MULTILINE)
    assert "runs" in CliRunner().invoke(main, ["--help"]).stdout
    done = CliRunner().invoke(main, ["token"])
    assert done.exit_code == 1
    assert "`lattice token` cannot be loaded: ModuleNotFoundError: No module named 'lattice_none'" in done.output


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("10.0.0.7", "--addr '10.0.0.7' names no port: write HOST:PORT, with a port from 1 to 65535"),
        ("10.0.0.7:99999", "--addr '10.0.0.7:99999' names no port: write HOST:PORT, with a port from 1 to 65535"),
        ("", "say which server to join: --addr HOST:PORT"),
    ],
)
def test_a_machine_must_be_told_the_port_of_its_server(address: str, text: str) -> None:
    done = call(address, "start", "--worker")
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (2, f"Error: {text}")


@pytest.mark.parametrize("option", ["--addr 127.0.0.1:50052", "--node-id x", "--drain-deadline 3"])
def test_the_server_refuses_options_of_a_machine_that_joins(option: str) -> None:
    done = CliRunner().invoke(main, ["start", "--head", *option.split()])
    text = f"Error: {option.split(maxsplit=1)[0]} belongs to --worker, and has no effect with --head: leave it out"
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (2, text)


@pytest.mark.parametrize("option", ["--port 1", "--journal memory", "--executor local", "--metrics none"])
def test_a_machine_that_joins_refuses_options_of_the_server(address: str, option: str) -> None:
    done = call(address, "start", "--worker", *option.split())
    text = f"Error: {option.split(maxsplit=1)[0]} belongs to --head, and has no effect with --worker: leave it out"
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (2, text)


def test_a_deadline_that_no_message_can_carry_is_refused() -> None:
    done = CliRunner().invoke(main, ["nodes", "drain", "local", "--deadline", "1e300"])
    assert done.exit_code == 2
    assert "is not in the range 0<=x<=2592000" in done.stderr


@pytest.mark.parametrize("label", ["zone", "=eu", ""])
def test_a_label_has_a_name_and_a_value(label: str) -> None:
    done = CliRunner().invoke(main, ["start", "--worker", "--addr", NOBODY, "--label", label])
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (2, f"Error: a label is NAME=VALUE, not {label!r}")


def test_options_of_one_role_are_options_of_the_command() -> None:
    (start,) = [entry.load() for entry in entry_points(group="lattice.commands", name="start")]
    assert {option.name for option in start.params} >= OF_HEAD | OF_WORKER


def run_script(folder: Path, code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    script = folder / "script.py"
    script.write_text(code)
    command = [LATTICE, "run", "--addr", NOBODY, str(script), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=WAIT_S, check=False
    )


def test_a_script_has_its_own_arguments_and_exit_status(tmp_path: Path) -> None:
    code = "import os, sys\nprint(sys.argv[1:], os.environ['LATTICE_TARGET'], sys.path[0], __name__)\nsys.exit(7)\n"
    arguments = ["--addr", "x", "--help", "--", "-v"]
    done = run_script(tmp_path, code, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (7, f"{arguments} {NOBODY} {tmp_path} __main__\n", "")


@pytest.mark.parametrize(
    "code",
    [
        "def deep():\n    raise KeyError('x')\ndeep()\n",
        "input()\n",
        "from lattice_client import LatticeError\nraise LatticeError('mine')\n",
        "raise KeyboardInterrupt\n",
        "import sys\nsys.exit('said')\n",
        "this is no Python\n",
    ],
)
def test_a_script_fails_as_it_would_with_python(tmp_path: Path, code: str) -> None:
    done = run_script(tmp_path, code)
    plain = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert plain.returncode != 0
    assert (done.returncode, done.stdout, done.stderr) == (plain.returncode, plain.stdout, plain.stderr)


@pytest.mark.parametrize("command", [[], ["runs"], ["runs", "list"], ["status"], ["start"]])
def test_help_has_a_short_option(command: list[str]) -> None:
    short, long = (CliRunner().invoke(main, [*command, option]) for option in ("-h", "--help"))
    assert (short.exit_code, short.stdout) == (0, long.stdout)


@pytest.mark.parametrize("typed", ["staus", "strat", "jornal"])
def test_a_command_that_is_mistyped_is_answered_with_similar_ones(typed: str) -> None:
    meant = {"staus": "status", "strat": "start", "jornal": "journal"}[typed]
    done = CliRunner().invoke(main, [typed])
    assert done.exit_code == 2
    assert f"No such command '{typed}'. Did you mean" in done.stderr
    assert f"'{meant}'" in done.stderr


def test_an_empty_address_is_refused() -> None:
    done = CliRunner().invoke(main, ["status", "--addr", ""])
    assert done.exit_code == 2
    assert "'--addr': it is empty" in done.stderr
