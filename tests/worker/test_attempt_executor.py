"""What becomes of attempts in the hands of a real worker: crashes, floods of output, limits, leftovers."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from google.protobuf.duration_pb2 import Duration
from lattice.v1 import errors_pb2, resources_pb2, run_pb2

from tests.worker.head import LIMIT_BYTES, Pair, pair
from tests.worker.shared import SharedWorker

pytestmark = pytest.mark.slow

Scenario = Callable[[Pair], Coroutine[Any, Any, None]]
FLOOD_BYTES = 300 * 1024 * 1024
SPARE_BYTES = 64 * 1024 * 1024


def play(scenario: Scenario, folder: Path) -> None:
    """Play a scenario with a worker; nothing the worker started may outlive it."""

    async def scene() -> None:
        async with pair(folder) as both:
            worker = psutil.Process(both.process.pid)
            await scenario(both)
            left = worker.children(recursive=True) if both.process.returncode is None else []
        async with asyncio.timeout(30):
            while any(map(runs, left)):
                await asyncio.sleep(0.01)

    asyncio.run(scene())


def runs(process: psutil.Process) -> bool:
    """Whether a process has not ended. The init of some machines reaps orphans only once a second; they have ended."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        ("exit", 3, "exited with status 3"),
        ("segfault", -signal.SIGSEGV, "SIGSEGV"),
        ("kill", -signal.SIGKILL, "SIGKILL"),
        ("abort", -signal.SIGABRT, "SIGABRT"),
    ],
)
def test_a_crash_ends_its_own_attempt_and_no_other(
    how: str, status: int, message: str, tmp_path: Path, worker: SharedWorker
) -> None:
    def crash(how: str) -> None:
        import ctypes

        match how:
            case "exit":
                os._exit(3)
            case "segfault":
                ctypes.string_at(0)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case _:
                os.abort()

    def wait_for(path: str) -> str:
        while not os.path.exists(path):
            time.sleep(0.01)
        return "calm"

    async def scenario(both: Pair) -> None:
        stream = both.stream
        stream.assign("calm", wait_for, slot=1, inputs={"path": str(tmp_path / "go")})
        stream.assign("crash", crash, slot=2, inputs={"how": how})
        stream.assign("next", lambda: "next", slot=2)
        failure = (await stream.end("crash")).failed.failure
        assert failure.kind == errors_pb2.FAILURE_KIND_CRASHED
        assert failure.exit_status == status
        assert message in failure.message
        assert await stream.value("next") == "next"
        (tmp_path / "go").touch()
        assert await stream.value("calm") == "calm"

    worker.play(scenario)


def test_a_segmentation_fault_leaves_its_stack_in_the_log(worker: SharedWorker) -> None:
    def crash_here() -> None:
        import ctypes

        ctypes.string_at(0)

    async def scenario(both: Pair) -> None:
        both.stream.assign("a", crash_here)
        await both.stream.end("a")
        assert "crash_here" in both.stream.logs("a")

    worker.play(scenario)


def print_much(size: int) -> int:
    line = "x" * 1023
    for _ in range(size // 1024):
        print(line)
    return os.getpid()


def write_much(size: int) -> int:
    import os

    block = b"y" * (1 << 20)
    for _ in range(size // len(block)):
        os.write(1, block)
    return os.getpid()


def print_one_huge_line(size: int) -> int:
    import os

    print("z" * size)
    return os.getpid()


@pytest.mark.parametrize("flood", [print_much, write_much, print_one_huge_line])
def test_a_flood_of_output_is_cut_and_takes_no_memory(flood: Callable[[int], int], tmp_path: Path) -> None:
    # By value: runners cannot import this module.
    code = flood.__code__
    flooding = type(flood)(code, {"os": os, "__builtins__": __builtins__}, flood.__name__)

    async def scenario(both: Pair) -> None:
        stream, worker = both.stream, psutil.Process(both.process.pid)
        stream.assign("warm", flooding, inputs={"size": 1 << 20})
        await stream.value("warm")
        before = worker.memory_info().rss
        stream.assign("a", flooding, inputs={"size": FLOOD_BYTES})
        pid = await stream.value("a")
        assert worker.memory_info().rss < before + SPARE_BYTES
        assert len(stream.logs("a")) < LIMIT_BYTES + 65536 + 100, "the limit, one read, and the notice"
        notices = [r.log.text for r in stream.reports if r.lease_id == "a" and r.log.truncated]
        assert len(notices) == 1
        assert "cut" in notices[0]
        stream.assign("b", lambda: print("after") or os.getpid())
        assert await stream.value("b") == pid, "the process lives"
        assert stream.logs("b") == "after\n"

    play(scenario, tmp_path)


def test_output_goes_to_the_attempt_that_wrote_it(worker: SharedWorker) -> None:
    def speak(name: str) -> None:
        import subprocess
        import sys
        import threading

        for number in range(50):
            print(name, number)
        print(name, "error", file=sys.stderr)
        sys.stdout.buffer.write(f"{name} bytes\n".encode())
        os.write(1, f"{name} descriptor\n".encode())
        subprocess.run(["echo", name, "child"], check=True)
        thread = threading.Thread(target=print, args=(name, "thread"))
        thread.start()
        thread.join()

    async def scenario(both: Pair) -> None:
        names = [f"n{number}" for number in range(8)]
        for number, name in enumerate(names):
            both.stream.assign(name, speak, slot=number % 2, inputs={"name": name})
        ended: set[str] = set()
        while ended < set(names):
            report = await both.stream.report()
            if report.WhichOneof("fact") == "succeeded":
                ended.add(report.lease_id)
        for name in names:
            lines = sorted(both.stream.logs(name).splitlines())
            extra = [f"{name} {what}" for what in ("bytes", "child", "descriptor", "error", "thread")]
            assert lines == sorted([*extra, *(f"{name} {number}" for number in range(50))])
            errors = [r for r in both.stream.reports if r.log.stream == run_pb2.LOG_STREAM_STDERR]
            assert "".join(r.log.text for r in errors if r.lease_id == name) == f"{name} error\n"

    worker.play(scenario)


def test_async_attempts_that_share_a_process_keep_their_output_apart(worker: SharedWorker) -> None:
    async def speak(name: str) -> int:
        for number in range(20):
            print(name, number)
            await asyncio.sleep(0)
        return os.getpid()

    async def scenario(both: Pair) -> None:
        names = [f"n{number}" for number in range(8)]
        for number, name in enumerate(names):
            both.stream.assign(name, speak, slot=number, is_async=True, inputs={"name": name})
        pids = {}
        while pids.keys() < set(names):
            report = await both.stream.report()
            if report.WhichOneof("fact") == "succeeded":
                pids[report.lease_id] = report.succeeded.outputs["out"].json
        assert len(set(pids.values())) == 1
        for name in names:
            assert both.stream.logs(name).splitlines() == [f"{name} {number}" for number in range(20)]

    worker.play(scenario)


def test_a_letter_cut_in_two_by_a_read_is_still_a_letter(worker: SharedWorker) -> None:
    def write() -> None:
        os.write(1, b".." + "€".encode() * 30_000)

    async def scenario(both: Pair) -> None:
        both.stream.assign("a", write)
        await both.stream.end("a")
        assert set(both.stream.logs("a")) == {".", "€"}

    worker.play(scenario)


def test_stopping_an_attempt_kills_children_in_other_sessions(worker: SharedWorker) -> None:
    def spawn() -> None:
        import subprocess
        import sys

        # A child in a session of its own with a child in a session of its own.
        code = "import subprocess; print(subprocess.Popen(['sleep', '600'], start_new_session=True).pid, flush=True)"
        code += "; import time; time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        print(child.pid)
        time.sleep(600)

    async def scenario(both: Pair) -> None:
        stream = both.stream
        stream.assign("a", spawn)
        while len(stream.logs("a").split()) < 2:
            await stream.report()
        spawned = [psutil.Process(int(pid)) for pid in stream.logs("a").split()]
        stream.say(stop_lease_ids=["a"])
        assert (await stream.end("a")).failed.failure.kind == errors_pb2.FAILURE_KIND_CANCELLED
        _, alive = await asyncio.to_thread(psutil.wait_procs, spawned, 30)
        assert not alive
        stream.assign("b", lambda: "b")
        assert await stream.value("b") == "b"

    worker.play(scenario)


def test_an_attempt_over_its_time_ends_and_the_next_one_starts(worker: SharedWorker) -> None:
    async def sleep_on() -> None:
        while True:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                print("ignored")

    async def scenario(both: Pair) -> None:
        stream, limit = both.stream, Duration(nanos=200_000_000)
        stream.assign("plain", lambda: time.sleep(600), timeout=limit)
        stream.assign("next", lambda: "next")
        stream.assign("kind", lambda: asyncio.sleep(600), slot=2, is_async=True, timeout=limit)
        stream.assign("stubborn", sleep_on, slot=3, is_async=True, timeout=limit)
        ends: dict[str, Any] = {}
        while len(ends) < 4:
            report = await stream.report()
            if report.WhichOneof("fact") in {"succeeded", "failed"}:
                ends[report.lease_id] = report
        for lease_id in ("plain", "kind", "stubborn"):
            assert ends[lease_id].failed.failure.kind == errors_pb2.FAILURE_KIND_TIMEOUT
        assert ends["next"].WhichOneof("fact") == "succeeded"

    worker.play(scenario)


def test_the_timeout_of_an_attempt_begins_when_its_process_has_started(tmp_path: Path) -> None:
    async def at_once() -> int:
        return 1

    async def scenario(both: Pair) -> None:
        # A worker that has just started takes about as long as this to start Python and the process of a task.
        both.stream.assign("cold", at_once, is_async=True, timeout=Duration(nanos=500_000_000))
        assert await both.stream.value("cold") == 1

    play(scenario, tmp_path)


def test_a_worker_that_is_told_to_end_leaves_nothing_behind(tmp_path: Path) -> None:
    async def scenario(both: Pair) -> None:
        both.stream.assign("a", lambda: time.sleep(600))
        await both.stream.until("a", "started")

    play(scenario, tmp_path)


def test_a_lease_fails_when_its_isolation_cannot_be_set_up(worker: SharedWorker) -> None:
    async def scenario(both: Pair) -> None:
        both.stream.assign("a", lambda: 1, isolation=resources_pb2.ISOLATION_DOCKER)
        failure = (await both.stream.end("a")).failed.failure
        assert failure.kind == errors_pb2.FAILURE_KIND_SANDBOX_SETUP

    worker.play(scenario)


def test_an_output_that_cannot_travel_is_a_payload_failure(worker: SharedWorker) -> None:
    async def scenario(both: Pair) -> None:
        both.stream.assign("a", lambda: __import__("threading").Lock())
        failure = (await both.stream.end("a")).failed.failure
        assert failure.kind == errors_pb2.FAILURE_KIND_PAYLOAD
        assert "lock" in failure.message

    worker.play(scenario)


def test_a_function_that_cannot_be_loaded_is_a_payload_failure_and_costs_no_process(worker: SharedWorker) -> None:
    class Elsewhere:
        def __reduce__(self) -> Any:
            return (__import__, ("no_such_module",))

    def use(thing: Any = Elsewhere()) -> None:  # noqa: B008
        """Carry a value that cannot be loaded."""

    async def scenario(both: Pair) -> None:
        stream = both.stream
        stream.assign("before", os.getpid)
        pid = await stream.value("before")
        stream.assign("a", use)
        failure = (await stream.end("a")).failed.failure
        assert failure.kind == errors_pb2.FAILURE_KIND_PAYLOAD
        assert "no_such_module" in failure.message
        stream.assign("after", os.getpid)
        assert await stream.value("after") == pid

    worker.play(scenario)


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "raise KeyboardInterrupt", "raise ValueError('x')"])
def test_an_error_of_any_kind_ends_the_attempt_and_not_the_process(code: str, worker: SharedWorker) -> None:
    def raise_it(code: str) -> None:
        exec(code)

    async def scenario(both: Pair) -> None:
        stream = both.stream
        stream.assign("before", os.getpid)
        pid = await stream.value("before")
        stream.assign("a", raise_it, inputs={"code": code})
        assert (await stream.end("a")).failed.failure.kind == errors_pb2.FAILURE_KIND_USER_ERROR
        stream.assign("after", os.getpid)
        assert await stream.value("after") == pid

    worker.play(scenario)


@pytest.mark.parametrize(
    "length",
    [10, 100_000],
    ids=["inline", "artifact"],
)
def test_a_task_may_write_to_an_array_it_was_given(length: int, worker: SharedWorker) -> None:
    def grow(array: Any) -> float:
        array += 1
        return float(array.sum())

    async def scenario(both: Pair) -> None:
        both.stream.assign("make", lambda: np.zeros(length))
        made = (await both.stream.end("make")).succeeded.outputs["out"]
        assert made.HasField("artifact") == (length > 1000)
        both.stream.assign("grow", grow, inputs={"array": made})
        assert await both.stream.value("grow") == length

    worker.play(scenario)


def test_the_answer_of_a_process_that_exits_with_invocations_unread_is_not_lost(worker: SharedWorker) -> None:
    def answer_and_exit(number: int) -> int:
        import threading

        # The process ends after this answer was sent, with pipelined invocations unread.
        threading.Thread(target=time.sleep, args=(600,)).start()
        return number

    async def scenario(both: Pair) -> None:
        numbers = range(30)
        for number in numbers:
            both.stream.assign(f"l{number}", answer_and_exit, inputs={"number": number})
        assert [await both.stream.value(f"l{number}") for number in numbers] == list(numbers)

    worker.play(scenario)
