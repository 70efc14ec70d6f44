"""Printing text of servers and tasks to a terminal; no command runs code of a task."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from lattice_client import LatticeClient, task
from lattice_client.cli.main import main
from lattice_client.cli.terminal import harmless, one_line, printable
from tests.client.shell import call, ended, terminal
from tests.client.test_progress import Story, drawn, progress_of
from tests.commands import LATTICE

pytestmark = pytest.mark.slow

OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
NASTY = "\x1b]0;owned\x07\x1b[2J\x9b1A\u202egnp.exe\u2066\r\x08\x7f"
HOSTILE = st.text(st.one_of(st.characters(), st.sampled_from("\x1b\x9b]P[;08mJ\x07\\\u202e\ud83d\r\n")))


class Pickled:
    """Writes a file wherever it is read."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


class PickledError(Exception):
    """The same, raised."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.args[0]),)


@task
def give(path: str) -> Any:
    return {"value": Pickled(path)}


@task
def throw(path: str) -> Any:
    raise PickledError(path)


@task
def several(n: int) -> Any:
    return {"n": n, "text": "plain"}


@task
def garble(text: str) -> None:
    print(text)
    raise ValueError(text)


@given(HOSTILE)
def test_harmless_replaces_control_characters_of_any_text(text: str) -> None:
    assert not OBEYED.search(harmless(text))
    assert not OBEYED.search(one_line(text))
    assert "\n" not in one_line(text)
    assert not OBEYED.search(printable(text).plain)


@given(HOSTILE)
def test_live_view_prints_no_control_characters_of_any_event(text: str) -> None:
    sent = "".join(c for c in text if not "\ud800" <= c <= "\udfff")  # half a character is in no message
    story, progress = Story(), progress_of(name=sent)
    progress.run.run_id = f"r{sent}"
    failure = {"kind": "USER_ERROR", "type": text, "message": text, "traceback": text, "task_id": text}
    started = story.event("task_started", text, attempt=1, node_id=text, gpu_indices=[])
    lines = [line for event in (started, story.log(text, text + "\n")) for line in progress.take(event)]
    progress.take(story.event("task_failed", text, attempt=1, failure=failure))
    assert not [line for line in [*drawn(progress), *(line.plain for line in lines)] if OBEYED.search(line)]


def test_colours_of_a_line_are_kept() -> None:
    (span,) = printable("\x1b[31mred\x1b[0m and not").spans
    assert (span.start, span.end, str(span.style)) == (0, 3, "color(1)")


@pytest.mark.parametrize("definition", [give, throw])
def test_commands_do_not_unpickle_outputs(address: str, client: LatticeClient, tmp_path: Path, definition: Any) -> None:
    touched = tmp_path / "touched"
    run = ended(client, definition, {"path": str(touched)})
    touched.unlink(missing_ok=True)
    commands = (["show", run], ["show", "--json", run], ["watch", run], ["watch", "--json", run], ["list"])
    for command in commands:
        call(address, "runs", *command)
    with terminal(address, "runs", "watch", run) as shown:
        shown.read_all()
    assert not touched.exists()


def test_values_are_shown_as_json_or_as_their_type_and_size(address: str, client: LatticeClient) -> None:
    run = ended(client, several, {"n": 1})
    (event,) = _succeeded(call(address, "runs", "watch", "--json", run).stdout)
    assert event["data"]["outputs"] == {"result": {"n": 1, "text": "plain"}}
    run = ended(client, give, {"path": "/nowhere"})
    (event,) = _succeeded(call(address, "runs", "watch", "--json", run).stdout)
    shown = event["data"]["outputs"]["result"]
    assert re.fullmatch(r"<application/vnd\.lattice\.cloudpickle, \d+ bytes>", shown)
    assert f"{{'result': {shown}}}" in call(address, "runs", "watch", run).stdout


def _succeeded(stdout: str) -> list[dict[str, Any]]:
    return [event for event in map(json.loads, stdout.splitlines()) if event["type"] == "task_succeeded"]


def test_control_characters_of_a_task_reach_no_terminal(address: str, client: LatticeClient) -> None:
    run = ended(client, garble, {"text": NASTY})
    commands = (
        ["list"],
        ["show", run],
        ["show", "--json", run],
        ["watch", run],
        ["watch", "--json", run],
        ["cancel", run],
        ["explain", run, "garble"],
    )
    for command in commands:
        done = call(address, "runs", *command)
        assert not OBEYED.search(done.stdout + done.stderr), command


def test_error_has_no_control_characters_when_an_argument_has_them(address: str) -> None:
    for command in (["runs", "show", NASTY], ["runs", "cancel", NASTY], ["nodes", "drain", NASTY]):
        done = call(address, *command)
        assert done.exit_code == 1
        assert not OBEYED.search(done.stdout + done.stderr), command


def test_the_version_is_shown() -> None:
    assert re.fullmatch(r"lattice \d+\.\d+\.\d+\n", CliRunner().invoke(main, ["--version"]).stdout)


def test_a_character_the_terminal_lacks_does_not_end_a_command(address: str, client: LatticeClient) -> None:
    workflow = client.create_workflow("caf\xe9 \N{ROCKET}")
    workflow.add_task(several, {"n": 1})
    run = workflow.run()
    run.result(timeout=60)
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "LATTICE_TARGET": address}
    done = subprocess.run([LATTICE, "runs", "show", run], env=environment, capture_output=True, check=True)
    assert b"caf\xe9 \\U0001f680" in done.stdout
