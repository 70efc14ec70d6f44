"""Where a worker's token is not: nowhere a task of the same user could look."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lattice_client import LatticeClient, task
from lattice_server.executors.processes import token_flags
from lattice_server.tokens import new_token
from lattice_worker import secrecy
from tests.commands import LATTICE
from tests.server.apps import NoWorkers, serving_aside
from tests.server.rpc.tenants import entry, write_tokens

TOKEN = new_token()
WAIT_S = 60
# A user without privileges: one that is not root, or root without any capability.
PLAIN = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"] if os.geteuid() == 0 else []


@task
def search(backwards: str) -> dict[str, Any]:
    """Look for a token in all that this user may read of its processes; return places found and places closed."""
    import ctypes
    import glob

    needle = backwards[::-1].encode()
    found: list[str] = []
    closed: set[str] = set()
    agent = parent = os.getpid()
    while parent > 1:
        agent, parent = parent, int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        command = Path(f"/proc/{parent}/cmdline").read_bytes() if parent else b""
        if b"--token-fd" in command:
            agent = parent
            break
    for folder in glob.glob("/proc/[0-9]*"):
        for name in ("environ", "cmdline", "maps"):
            try:
                data = Path(folder, name).read_bytes()
            except OSError:
                if folder == f"/proc/{agent}":
                    closed.add(name)
                continue
            if needle in data:
                found.append(f"{folder}/{name}")
    try:
        for link in os.listdir(f"/proc/{agent}/fd"):
            # Not blocking: a pipe may be empty.
            descriptor = os.open(f"/proc/{agent}/fd/{link}", os.O_RDONLY | os.O_NONBLOCK)
            if needle in os.read(descriptor, 1 << 16):
                found.append(f"descriptor {link}")
    except OSError:
        closed.add("fd")
    try:
        Path(f"/proc/{agent}/mem").open("rb").close()
    except OSError:
        closed.add("mem")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(16, agent, 0, 0) != 0:  # PTRACE_ATTACH
        closed.add("ptrace")
    if needle in "\n".join(f"{name}={value}" for name, value in os.environ.items()).encode():
        found.append("the task's environment")
    folders = [os.getcwd(), os.path.expanduser("~"), "/dev/shm"]
    return {"found": found, "closed": sorted(closed), "agent": agent, "files": _files(folders, needle)}


def _files(folders: list[str], needle: bytes) -> list[str]:
    found = []
    for top in folders:
        for folder, names, files in os.walk(top):
            if folder.count("/") > top.count("/") + 3:
                names.clear()
            for name in files:
                path = os.path.join(folder, name)
                try:
                    if os.path.isfile(path) and os.path.getsize(path) < 1 << 20:
                        with open(path, "rb") as file:
                            if needle in file.read():
                                found.append(path)
                except OSError:
                    continue
    return found


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A server without workers of its own that asks for tokens."""
    path = write_tokens(
        tmp_path / "tokens.toml",
        entry("worker", scopes=["worker"], token=TOKEN, nodes='["far"]'),
        entry("caller", scopes=["submit"], token="callers"),
    )
    with serving_aside(NoWorkers(), tokens_file=str(path)) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("way", ["lattice start --worker", "python -m lattice_worker"])
def test_a_task_finds_its_workers_token_nowhere(address: str, way: str, tmp_path: Path) -> None:
    flags = ["--addr", address, "--node-id", "far", "--num-cpus", "1"]
    command = [LATTICE, "start", "--worker"] if way.startswith("lattice") else [sys.executable, "-m", "lattice_worker"]
    known = {name: value for name, value in os.environ.items() if not name.startswith("LATTICE_")}
    environment = {**known, "LATTICE_TOKEN": TOKEN, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    worker = subprocess.Popen([*PLAIN, *command, *flags], env=environment, stdout=subprocess.DEVNULL, cwd=tmp_path)
    try:
        with LatticeClient(address, token="callers") as client:
            seen = client.run_task(search, {"backwards": TOKEN[::-1]})["result"]
        assert seen["agent"] == worker.pid
        assert seen["found"] == seen["files"] == []
        assert {"environ", "fd", "mem", "maps", "ptrace"} <= set(seen["closed"])
        assert TOKEN not in " ".join(psutil.Process(worker.pid).cmdline())
    finally:
        worker.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.wait(WAIT_S)
        worker.kill()


def test_a_token_comes_by_a_pipe_that_is_closed_then() -> None:
    flag, number = token_flags(TOKEN)
    assert flag == secrecy.FLAG
    assert os.get_inheritable(int(number))
    assert secrecy.read_token(int(number)) == TOKEN
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(int(number))


def test_the_longest_token_waits_for_nobody() -> None:
    _, number = token_flags("é" * secrecy.MAX_TOKEN)
    assert secrecy.read_token(int(number)) == "é" * secrecy.MAX_TOKEN


def test_a_token_that_is_too_long_is_refused_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="LATTICE_TOKEN has more than 4096 characters"):
        secrecy.move_token({"LATTICE_TOKEN": "x" * 4097}, ["python"])


def test_a_program_without_a_token_goes_on() -> None:
    environment = {"A": "b"}
    secrecy.move_token(environment, ["python"])
    assert environment == {"A": "b"}


def test_process_that_keeps_secrets_is_hidden_and_leaves_no_core_file() -> None:
    code = "import ctypes, resource\nfrom lattice_worker import secrecy\nsecrecy.keep_secrets()\n"
    code += "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), *resource.getrlimit(resource.RLIMIT_CORE))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.split() == ["0", "0", "0"]
