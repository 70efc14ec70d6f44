"""What code in a sandbox tries, by level: refused, ended with a kind of failure, or not claimed by the level."""

import asyncio
import contextlib
import dataclasses
import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lattice_worker.sandbox import memory
from lattice_worker.sandbox.memory import tree
from lattice_worker.sandbox.policy import LEVELS, MIB, SECCOMP, SUBPROCESS, Policy, interpreter_environment, policy_of
from tests.sandbox import attempts
from tests.sandbox.boxes import Box, boxes, in_box

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the table is for agents that are root")


def each_at_one_level(*ways: Callable[..., Any]) -> list[Any]:
    """Return each level with each way; `make test` takes each way at one level, since the same watchdog is for all."""
    return [
        pytest.param(level, way, marks=[] if place % len(LEVELS) == number else pytest.mark.exhaustive)
        for place, way in enumerate(ways)
        for number, level in enumerate(LEVELS)
    ]


def small(level: str) -> Policy:
    return dataclasses.replace(policy_of(level), scratch_bytes=32 * MIB, shared_memory_bytes=32 * MIB, cpu_s=1)


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[attempts.Outside]:
    """Things of the machine that a sandbox must not reach."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "token").write_text("secret")
    (folder / "token").chmod(0o600)
    (folder / "public").write_text("public")
    abstract = f"\0lattice-test-{os.getpid()}"
    with (
        tempfile.TemporaryDirectory(prefix="lattice-t-") as short,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as named,
        socket.socket(socket.AF_UNIX) as unnamed,
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other,
    ):
        for sock, address in ((named, f"{short}/s"), (unnamed, abstract)):
            sock.bind(address)
            sock.listen()
        # Not a number that a process of the sandbox could have, too.
        yield {
            "token": str(folder / "token"),
            "public": str(folder / "public"),
            "pid": other.pid,
            "port": server.getsockname()[1],
            "unix": f"{short}/s",
            "abstract": abstract,
        }
        other.communicate(b"\n")


@pytest.fixture(scope="module")
def verdicts(outside: attempts.Outside, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The verdict of each attempt, by level."""

    def made(level: str) -> dict[str, str]:
        policy = dataclasses.replace(small(level), cpu_s=60)
        return dict(in_box(policy, tmp_path_factory.mktemp(level), attempts.verdicts, outside))

    return {level: made(level) for level in LEVELS}


@pytest.mark.parametrize("name", attempts.ATTEMPTS)
@pytest.mark.parametrize("level", LEVELS)
def test_attempt_has_the_verdict_of_its_level(level: str, name: str, verdicts: dict[str, dict[str, str]]) -> None:
    expected = getattr(attempts.ATTEMPTS[name], level)
    if expected:
        assert verdicts[level][name].startswith(expected)


def test_files_outside_are_unchanged_after_all_attempts(
    outside: attempts.Outside, verdicts: dict[str, dict[str, str]]
) -> None:
    assert set(verdicts) == set(LEVELS)
    assert Path(outside["public"]).read_text() == "public"
    assert not Path("/etc/ld.so.preload").exists()
    assert os.path.getsize(os.__file__) > 0


DELEGATED = "delegated_group"  # The fixture.


async def _in_boxes(folder: Path, policy: Policy, act: Callable[[Box], Any], group: str = "") -> Any:
    async with boxes(folder, named_group=group) as start:
        return await act(await start(policy))


@pytest.mark.parametrize("group", ["", DELEGATED])
@pytest.mark.parametrize(
    ("level", "use"),
    each_at_one_level(
        attempts.use_private_memory,
        attempts.use_shared_memory,
        attempts.use_memory_in_children,
        attempts.use_files_in_memory,
    ),
)
def test_sandbox_is_ended_when_it_uses_too_much_memory(
    level: str, use: Callable[[], None], group: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    named = str(request.getfixturevalue(group)) if group else ""

    async def act(box: Box) -> tuple[int, str]:
        box.watch(200 * MIB)
        box.send(use)
        status = await box.end()
        # Where the kernel ended the runner itself, its status says so.
        return status, box.excess or str(box.supervisor.crash(status, 0.0))

    status, excess = asyncio.run(_in_boxes(tmp_path, policy_of(level), act, named))
    assert (status, f"the limit is {200 * MIB}" in excess) == (-signal.SIGKILL, True)


@pytest.mark.parametrize("level", [pytest.param(SUBPROCESS, marks=pytest.mark.exhaustive), SECCOMP])
def test_memory_that_forked_processes_share_counts_once(level: str, tmp_path: Path) -> None:
    def fork_with(size: int) -> int:
        kept = bytearray(size)
        pids = []
        for _ in range(4):
            if not (pid := os.fork()):
                time.sleep(1)
                os._exit(0)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)
        return len(kept)

    async def act(box: Box) -> tuple[int, str]:
        box.watch(200 * MIB)
        return await box.run(fork_with, 100 * MIB), box.excess

    assert asyncio.run(_in_boxes(tmp_path, policy_of(level), act)) == (100 * MIB, "")


@pytest.mark.parametrize(("level", "run"), each_at_one_level(attempts.compute, attempts.compute_and_ignore_signal))
def test_sandbox_is_ended_when_it_uses_too_much_processor_time(
    level: str, run: Callable[[], None], tmp_path: Path
) -> None:
    async def act(box: Box) -> tuple[str, str] | None:
        box.send(run)
        return box.supervisor.crash(await box.end(), box.process.cpu_s)

    assert asyncio.run(_in_boxes(tmp_path, small(level), act)) == (
        "cpu_time",
        "it used more than 1 s of processor time",
    )


def compute_in_children() -> None:
    """Use processor time in children that each stay below the limit, with a parent that does not wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        if not (child := os.fork()):
            end = time.process_time() + 0.3
            while time.process_time() < end:
                pass
            os._exit(0)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def compute_in_children_that_are_waited_for() -> None:
    """Use processor time in short children, one after the other."""
    while True:
        if not (child := os.fork()):
            end = time.process_time() + 0.01
            while time.process_time() < end:
                pass
            os._exit(0)
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    ("level", "run"), each_at_one_level(compute_in_children, compute_in_children_that_are_waited_for)
)
def test_sandbox_is_ended_when_its_children_use_too_much_processor_time(
    level: str, run: Callable[[], None], tmp_path: Path
) -> None:
    async def act(box: Box) -> tuple[int, str]:
        box.watch(200 * MIB)
        box.send(run)
        return await box.end(), box.excess

    status, excess = asyncio.run(_in_boxes(tmp_path, small(level), act))
    assert (status, excess.startswith("cpu_time: "), "the limit is 1 s" in excess) == (-signal.SIGKILL, True, True)


def test_sandbox_is_ended_when_it_can_no_longer_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(box: Box) -> tuple[int, str]:
        def fail(*_: object) -> int:
            raise ValueError("no figure")

        monkeypatch.setattr(memory, "used_bytes", fail)
        box.watch(200 * MIB)
        box.send(functools.partial(time.sleep, 600))
        return await box.end(), box.excess

    status, excess = asyncio.run(_in_boxes(tmp_path, small("subprocess"), act))
    assert status == -signal.SIGKILL
    assert excess == "internal: its memory and processor time could not be measured: ValueError: no figure"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="only x86-64 has a second table of calls")
def test_sandbox_is_ended_when_it_calls_by_another_table(tmp_path: Path) -> None:
    async def act(box: Box) -> tuple[str, str] | None:
        box.send(attempts.call_by_other_table)
        return box.supervisor.crash(await box.end(), box.process.cpu_s)

    found = asyncio.run(_in_boxes(tmp_path, small(SECCOMP), act))
    assert found is not None
    assert found[0] == "policy"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, signal.SIGBUS])
def test_sandbox_ends_with_the_signal_that_killed_its_process(level: str, number: int, tmp_path: Path) -> None:
    async def act(box: Box) -> int:
        box.send(functools.partial(os.kill, 0, number))
        return await box.end()

    assert asyncio.run(_in_boxes(tmp_path, small(level), act)) == -number


@pytest.mark.parametrize("level", LEVELS)
def test_sandbox_ends_with_the_status_of_its_process(level: str, tmp_path: Path) -> None:
    async def act(box: Box) -> int:
        box.send(os._exit, 7)
        return await box.end()

    assert asyncio.run(_in_boxes(tmp_path, small(level), act)) == 7


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("run", [attempts.outlive, attempts.stop_itself])
def test_all_processes_end_when_the_sandbox_is_ended(level: str, run: Callable[..., Any], tmp_path: Path) -> None:
    async def act(box: Box) -> tuple[int, list[int]]:
        given = ("x",) if run is attempts.outlive else ()
        box.send(run, *given)
        if given:
            await box._answer
        else:
            await asyncio.sleep(0.2)
        pids = tree(box.process.pid)
        box.process.kill()
        await box.end()
        return len(pids), pids

    count, pids = asyncio.run(_in_boxes(tmp_path, small(level), act))
    assert count >= 3 + (run is attempts.outlive)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


def test_secrets_of_the_environment_are_not_in_the_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    found = in_box(small(SUBPROCESS), tmp_path, lambda: list(os.environ))
    assert "HOME" in found
    assert "AWS_SECRET_ACCESS_KEY" not in found


def test_zygote_of_sandboxes_has_no_secrets_to_inherit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    monkeypatch.setenv("LATTICE_TOKEN", "canary")
    assert "canary" not in interpreter_environment().values()
