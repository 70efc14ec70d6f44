"""Coroutines of several attempts in one process: each changes the event loop for itself only."""

import asyncio
import concurrent.futures
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest
from lattice.v1 import errors_pb2

from tests.worker.head import Stream, pair

Scenario = Callable[[Stream], Coroutine[Any, Any, None]]
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Scenario], None]]:
    """Plays scenarios with one worker; the numbers of their leases differ."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Runners cannot import this module.
    with asyncio.Runner() as runner:
        context = pair(tmp_path_factory.mktemp("store"))
        both = runner.run(context.__aenter__())

        def play(scenario: Scenario) -> None:
            async def scene() -> None:
                both.stream.reports.clear()
                async with asyncio.timeout(LIMIT_S):
                    await scenario(both.stream)

            runner.run(scene())

        yield play
        runner.run(context.__aexit__(None, None, None))
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


async def wait_at_gate() -> int:
    """Wait until another coroutine opens the gate; return the process."""
    gate = sys.gate = asyncio.Event()  # type: ignore[attr-defined]
    print("waiting")
    await gate.wait()
    return os.getpid()


async def open_gate() -> int:
    """Wake the coroutine at the gate; return the process."""
    sys.gate.set()  # type: ignore[attr-defined]
    return os.getpid()


class Script:
    """Coroutines that a test runs in one process."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._count = 0

    def start(self, function: Callable[..., Any], **inputs: Any) -> str:
        """Start a coroutine function; return its lease."""
        self._count += 1
        lease_id = f"{function.__name__}-{self._count}-{os.urandom(4).hex()}"
        self.stream.assign(lease_id, function, slot=self._count, is_async=True, inputs=inputs)
        return lease_id

    async def value(self, function: Callable[..., Any], **inputs: Any) -> Any:
        """Run a coroutine function; return its value."""
        return await self.stream.value(self.start(function, **inputs))

    async def neighbour(self) -> str:
        """Start a coroutine that waits until the gate opens; return its lease."""
        lease_id = self.start(wait_at_gate)
        while "waiting" not in self.stream.logs(lease_id):
            await self.stream.report()
        return lease_id

    async def check(self, neighbour: str) -> None:
        """Open the gate; assert that the neighbour ends in the process it was started in."""
        pid = await self.value(open_gate)
        assert await self.stream.value(neighbour) == pid


async def stop() -> None:
    """Stop the loop."""
    asyncio.get_running_loop().stop()


async def stop_from_a_thread() -> None:
    """Stop the loop from elsewhere."""
    loop = asyncio.get_running_loop()
    await asyncio.to_thread(loop.call_soon_threadsafe, loop.stop)


async def close() -> None:
    """Close the loop."""
    loop = asyncio.get_running_loop()
    loop.stop()
    loop.close()


async def cancel_all() -> None:
    """Cancel what `asyncio.all_tasks` shows."""
    for other in asyncio.all_tasks() - {asyncio.current_task()}:
        other.cancel()


async def cancel_all_by_module() -> None:
    """Cancel all tasks that the module shows."""
    for other in asyncio.tasks.all_tasks(asyncio.get_event_loop()) - {asyncio.current_task()}:
        other.cancel()


async def gather_all() -> None:
    """Wait for all other tasks."""
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})


async def shut_down_executor() -> None:
    """End the default executor."""
    await asyncio.to_thread(int)
    await asyncio.get_running_loop().shutdown_default_executor()


async def replace_executor() -> None:
    """Set a default executor, and end it."""
    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(1)
    asyncio.get_running_loop().set_default_executor(pool)
    pool.shutdown()


async def shut_down_generators() -> None:
    """Close all asynchronous generators."""
    await asyncio.get_running_loop().shutdown_asyncgens()


async def set_all() -> None:
    """Use every setter of the loop."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError("refused")

    loop = asyncio.get_running_loop()
    loop.set_task_factory(refuse)
    loop.set_exception_handler(refuse)
    loop.set_debug(True)
    loop.slow_callback_duration = 0
    asyncio.set_event_loop(None)


async def trace() -> None:
    """Leave a trace function behind, which ends the steps of others."""

    def refuse(frame: Any, *_: Any) -> Any:
        if frame.f_code.co_name in {"use_all", "wait_at_gate", "run_marked"}:
            raise ValueError("traced")

    sys.settrace(refuse)
    sys.setprofile(refuse)


async def use_all() -> list[Any]:
    """Use every method of the loop."""

    async def count() -> Any:
        for number in range(3):
            await asyncio.sleep(0)
            yield number

    thread = await asyncio.to_thread(int, "5")
    task = await asyncio.create_task(asyncio.sleep(0, 6))
    return [thread, task, [number async for number in count()]]


CULPRITS = [
    stop,
    stop_from_a_thread,
    close,
    cancel_all,
    cancel_all_by_module,
    gather_all,
    shut_down_executor,
    replace_executor,
    shut_down_generators,
    set_all,
    trace,
]


@pytest.mark.parametrize("culprit", CULPRITS)
def test_other_coroutines_go_on_when_one_ends_or_changes_the_loop(
    play: Callable[[Scenario], None], culprit: Callable[..., Any]
) -> None:
    async def scenario(stream: Stream) -> None:
        script = Script(stream)
        neighbour = await script.neighbour()
        await script.value(culprit)
        assert await script.value(use_all) == [5, 6, [0, 1, 2]]
        await script.check(neighbour)

    play(scenario)


def test_all_tasks_shows_a_coroutine_its_own_tasks(play: Callable[[Scenario], None]) -> None:
    async def look() -> list[int]:
        inner = asyncio.create_task(asyncio.sleep(0))
        found = asyncio.all_tasks()
        return [len(found), inner in found, asyncio.current_task() in found]

    async def scenario(stream: Stream) -> None:
        script = Script(stream)
        neighbour = await script.neighbour()
        assert await script.value(look) == [2, True, True]
        await script.check(neighbour)

    play(scenario)


def test_an_asynchronous_generator_goes_on_when_another_coroutine_closes_all(play: Callable[[Scenario], None]) -> None:
    async def generate() -> list[int]:
        gate = sys.gate = asyncio.Event()  # type: ignore[attr-defined]

        async def count() -> Any:
            yield 1
            yield 2

        found = []
        async for number in count():
            found.append(number)
            if number == 1:
                print("waiting")
                await gate.wait()
        return found

    async def scenario(stream: Stream) -> None:
        script = Script(stream)
        lease_id = script.start(generate)
        while "waiting" not in stream.logs(lease_id):
            await stream.report()
        await script.value(shut_down_generators)
        await script.value(open_gate)
        assert await stream.value(lease_id) == [1, 2]

    play(scenario)


def test_a_coroutine_uses_its_own_settings_of_the_loop(play: Callable[[Scenario], None]) -> None:
    async def use() -> list[Any]:
        loop, closed, made = asyncio.get_running_loop(), [], []

        async def count() -> Any:
            try:
                yield 1
            finally:
                closed.append("generator")

        def make(loop: Any, coro: Any, **settings: Any) -> Any:
            made.append(coro.__name__)
            return asyncio.Task(coro, loop=loop, **settings)

        numbers = count()
        await anext(numbers)
        await loop.shutdown_asyncgens()
        with concurrent.futures.ThreadPoolExecutor(thread_name_prefix="mine") as pool:
            loop.set_default_executor(pool)
            thread = await asyncio.to_thread(lambda: threading.current_thread().name)
        loop.set_task_factory(make)
        await asyncio.create_task(asyncio.sleep(0))
        return [closed, thread.partition("_")[0], made]

    async def scenario(stream: Stream) -> None:
        assert await Script(stream).value(use) == [["generator"], "mine", ["sleep"]]

    play(scenario)


def test_threads_that_a_coroutine_leaves_behind_keep_no_other_one_waiting(play: Callable[[Scenario], None]) -> None:
    async def leave() -> None:
        import threading

        for _ in range(100):
            asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)

    async def scenario(stream: Stream) -> None:
        script = Script(stream)
        await script.value(leave)
        assert await script.value(use_all) == [5, 6, [0, 1, 2]]

    play(scenario)


def test_the_loop_of_a_thread_does_not_hide_whose_step_takes_the_process_down(
    play: Callable[[Scenario], None], tmp_path: Path
) -> None:
    async def run_a_loop(path: str) -> None:
        def spin() -> None:
            async def wait() -> None:
                while not os.path.exists(path):
                    await asyncio.sleep(0)

            asyncio.run(wait())

        await asyncio.to_thread(spin)

    async def exit_late(path: str) -> None:
        time.sleep(0.05)  # While the loop of the thread goes round.
        os._exit(3)

    async def scenario(stream: Stream) -> None:
        script = Script(stream)
        spinning = script.start(run_a_loop, path=str(tmp_path / "end"))
        failed = (await stream.end(script.start(exit_late, path=""))).failed.failure
        (tmp_path / "end").touch()
        assert failed.kind == errors_pb2.FAILURE_KIND_CRASHED
        assert stream.of(spinning)[-1] != "failed"

    play(scenario)


async def ring() -> None:
    """Have an alarm raise an error between two steps."""
    rang = asyncio.Event()

    def raise_it(*_: Any) -> None:
        rang.set()
        raise TimeoutError("alarm")

    signal.signal(signal.SIGALRM, raise_it)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    await rang.wait()


async def leave_alarm() -> None:
    """Leave a timer and handlers behind."""

    def raise_it(*_: Any) -> None:
        raise TimeoutError("alarm")

    signal.signal(signal.SIGALRM, raise_it)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, raise_it)
    signal.alarm(600)
    signal.setitimer(signal.ITIMER_VIRTUAL, 600)


async def signal_state() -> list[Any]:
    """Return the handlers and the timers."""
    handlers = [signal.getsignal(number) == signal.SIG_DFL for number in (signal.SIGALRM, signal.SIGUSR1)]
    return [*handlers, *(signal.getitimer(timer)[0] for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL))]


async def wait_for_signal() -> str:
    """Return the text that the handler of a signal sets before it raises an error."""
    said: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def raise_it(*_: Any) -> None:
        said.set_result("mine")
        raise TimeoutError("signal")

    signal.signal(signal.SIGUSR2, raise_it)
    print("waiting")
    return await said


async def send_signal() -> str:
    """Send a signal to the process."""
    os.kill(os.getpid(), signal.SIGUSR2)
    return "sent"


def test_other_coroutines_go_on_when_the_signal_handler_of_one_raises(play: Callable[[Scenario], None]) -> None:
    async def scenario(stream: Stream) -> None:
        script = Script(stream)
        neighbour = await script.neighbour()
        await script.value(ring)
        waiting = script.start(wait_for_signal)
        while "waiting" not in stream.logs(waiting):
            await stream.report()
        sending = script.start(send_signal)
        found = dict.fromkeys((waiting, sending), "")
        for _ in found:
            report = await stream.report()
            while report.WhichOneof("fact") not in {"succeeded", "failed", "returned"}:
                report = await stream.report()
            found[report.lease_id] = report.succeeded.outputs["out"].json
        assert found == {waiting: '"mine"', sending: '"sent"'}
        await script.check(neighbour)

    play(scenario)


def test_timers_and_signal_handlers_of_a_coroutine_end_with_it(play: Callable[[Scenario], None]) -> None:
    async def scenario(stream: Stream) -> None:
        script = Script(stream)
        neighbour = await script.neighbour()
        await script.value(leave_alarm)
        assert await script.value(signal_state) == [True, True, 0.0, 0.0]
        await script.check(neighbour)

    play(scenario)


async def write_raw(text: str) -> None:
    """Write past `sys.stdout` in each of the ways there are."""
    import ctypes

    os.write(1, f"{text} descriptor\n".encode())
    ctypes.CDLL(None).puts(f"{text} library".encode())
    os.system(f"echo {text} shell")


RAW = ["descriptor", "library", "shell"]


def test_a_coroutine_has_output_past_its_streams_in_its_log(play: Callable[[Scenario], None]) -> None:
    async def scenario(stream: Stream) -> None:
        script = Script(stream)
        for number in range(20):
            lease_id = script.start(write_raw, text=f"n{number}")
            await stream.value(lease_id)
            assert all(f"n{number} {how}" in stream.logs(lease_id) for how in RAW), stream.logs(lease_id)

    play(scenario)


def test_output_of_a_coroutine_is_in_no_other_log_when_another_one_starts(play: Callable[[Scenario], None]) -> None:
    async def write_and_wait() -> None:
        gate = sys.gate = asyncio.Event()  # type: ignore[attr-defined]
        print("waiting")
        while not asyncio.get_running_loop()._ready:  # type: ignore[attr-defined]
            time.sleep(0.001)  # In this step, until the other one is to start in the next.
        os.write(1, b"first\n")
        await gate.wait()

    async def scenario(stream: Stream) -> None:
        script = Script(stream)
        for _ in range(10):
            first = script.start(write_and_wait)
            while "waiting" not in stream.logs(first):
                await stream.report()
            second = script.start(open_gate)
            ended = set()
            while ended < {first, second}:
                report = await stream.report()
                if report.WhichOneof("fact") == "succeeded":
                    ended.add(report.lease_id)
            assert sorted(stream.logs(first).splitlines()) == ["first", "waiting"]
            assert stream.logs(second) == ""

    play(scenario)


async def leave_child(how: str, fifo: str) -> int:
    """Start a child in one of the ways there are, which lives on; return its process id."""
    import multiprocessing
    import subprocess

    command = ["/bin/sh", "-c", f"echo $$ > {fifo}; exec sleep 600"]

    def fork_twice() -> None:
        if (pid := os.fork()) == 0:
            if os.fork() == 0:
                os.execv(command[0], command)
            os._exit(0)
        os.waitpid(pid, 0)

    match how:
        case "popen":
            subprocess.Popen(command)
        case "clean":
            subprocess.Popen(["env", "-i", "setsid", *command])
        case "daemon":
            subprocess.run(
                ["/bin/sh", "-c", f"(setsid sh -c '{command[-1]}' >/dev/null 2>&1 </dev/null &)"], check=True
            )
        case "shell":
            os.system(f"nohup sh -c '{command[-1]}' >/dev/null 2>&1 &")
        case "posix_spawn":
            os.posix_spawn(command[0], command, {})
        case "fork":
            if os.fork() == 0:
                os.execv(command[0], command)
        case "double_fork":
            fork_twice()
        case "thread":
            await asyncio.to_thread(fork_twice)
        case "spawnv":
            os.spawnv(os.P_NOWAIT, command[0], command)
        case _:
            multiprocessing.get_context(how).Process(target=os.execv, args=(command[0], command)).start()
    with await asyncio.to_thread(open, fifo) as file:
        return int(file.read())


HOWS = ["popen", "clean", "daemon", "shell", "posix_spawn", "spawnv", "double_fork", "thread"]


@pytest.mark.parametrize("how", [*HOWS, "fork", "spawn"])
def test_children_end_with_the_coroutine_that_started_them_while_others_run(
    play: Callable[[Scenario], None], how: str, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "kept")
    os.mkfifo(tmp_path / "ended")

    async def keep_child(fifo: str) -> int:
        import subprocess

        gate = sys.gate = asyncio.Event()  # type: ignore[attr-defined]
        kept = subprocess.Popen(["/bin/sh", "-c", "sleep 600"])
        daemon = ["/bin/sh", "-c", f"(setsid sh -c 'echo $$ > {fifo}; exec sleep 600' >/dev/null 2>&1 </dev/null &)"]
        subprocess.run(daemon, check=True)
        with await asyncio.to_thread(open, fifo) as file:
            adopted = int(file.read())
        print("waiting")
        await gate.wait()
        os.kill(adopted, 0)
        return kept.poll() is None

    async def scenario(stream: Stream) -> None:
        script = Script(stream)
        neighbour = script.start(keep_child, fifo=str(tmp_path / "kept"))
        while "waiting" not in stream.logs(neighbour):
            await stream.report()
        pid = await script.value(leave_child, how=how, fifo=str(tmp_path / "ended"))
        with contextlib.suppress(psutil.NoSuchProcess):
            _, alive = await asyncio.to_thread(psutil.wait_procs, [psutil.Process(pid)], 30)
            assert not alive
        await script.value(open_gate)
        assert await stream.value(neighbour) is True

    play(scenario)


def test_children_of_unknown_origin_end_when_no_coroutine_runs(play: Callable[[Scenario], None]) -> None:
    async def leave() -> int:
        import ctypes

        libc = ctypes.PyDLL(None)
        if (pid := libc.fork()) == 0:
            libc.pause()
        return int(pid)

    async def look(pid: int) -> bool:
        return os.path.exists(f"/proc/{pid}")

    async def scenario(stream: Stream) -> None:
        script = Script(stream)
        assert await script.value(look, pid=await script.value(leave)) is False

    play(scenario)


def test_output_of_children_is_in_the_log_of_their_coroutine(play: Callable[[Scenario], None]) -> None:
    async def speak(name: str) -> None:
        import multiprocessing
        import subprocess

        subprocess.run(["echo", f"{name} run"], check=True)
        os.system(f"echo {name} system")
        os.waitpid(os.posix_spawn("/bin/echo", ["echo", f"{name} spawn"], os.environ), 0)
        process = multiprocessing.get_context("fork").Process(target=print, args=(f"{name} fork",))
        process.start()
        process.join()

    async def scenario(stream: Stream) -> None:
        script = Script(stream)
        neighbour = await script.neighbour()
        for name in ("a", "b", "c"):
            lease_id = script.start(speak, name=name)
            await stream.value(lease_id)
            assert stream.logs(lease_id).splitlines() == [f"{name} {how}" for how in ("run", "system", "spawn", "fork")]
        await script.check(neighbour)
        assert stream.logs(neighbour) == "waiting\n"

    play(scenario)


def test_a_coroutine_may_wait_for_a_child_that_writes_much(play: Callable[[Scenario], None]) -> None:
    async def flood() -> int:
        return os.system("head -c 1000000 /dev/zero") + os.system("exit 3")

    async def scenario(stream: Stream) -> None:
        assert await Script(stream).value(flood) == 3 << 8

    play(scenario)


async def move_away() -> None:
    """Leave the process in a directory that is gone."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)


async def directory() -> str:
    """Return the working directory."""
    return os.getcwd()


def test_a_function_is_loaded_when_another_coroutine_removed_the_directory(play: Callable[[Scenario], None]) -> None:
    async def move_and_wait() -> None:
        import tempfile

        gate = sys.gate = asyncio.Event()  # type: ignore[attr-defined]
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
        print("waiting")
        await gate.wait()

    async def scenario(stream: Stream) -> None:
        script = Script(stream)
        before = await script.value(directory)
        mover = script.start(move_and_wait)
        while "waiting" not in stream.logs(mover):
            await stream.report()
        await script.value(open_gate)
        await stream.value(mover)
        neighbour = await script.neighbour()
        await script.value(move_away)
        assert await script.value(directory) == before
        await script.check(neighbour)
        await script.value(move_away)
        assert await script.value(directory) == before

    play(scenario)


def test_the_process_is_restored_when_no_coroutine_runs(play: Callable[[Scenario], None]) -> None:
    async def look() -> list[Any]:
        import gc
        import logging
        import warnings

        policy = type(asyncio.get_event_loop_policy()).__name__
        umask = os.umask(0o22)
        os.umask(umask)
        warned = [str(found) for found in warnings.filters]
        blocked = len(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        levels = [blocked, logging.root.level, len(logging.root.handlers), logging.root.manager.disable]
        streams = [type(sys.stdout).__name__, os.fstat(1).st_ino]
        environment = sorted(os.environ.items())
        return [policy, umask, warned, levels, streams, environment, gc.isenabled(), sys.getrecursionlimit()]

    async def change() -> None:
        import gc
        import logging
        import warnings

        class Policy(asyncio.DefaultEventLoopPolicy):
            pass

        asyncio.set_event_loop_policy(Policy())
        os.umask(0o777)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        warnings.simplefilter("error")
        logging.basicConfig(level=logging.DEBUG)
        logging.disable(logging.CRITICAL)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # left open, as careless code does
        os.dup2(sys.stdout.fileno(), 1)
        os.environ["LEFT"] = "behind"
        gc.disable()
        sys.setrecursionlimit(5000)

    async def scenario(stream: Stream) -> None:
        script = Script(stream)
        before = await script.value(look)
        await script.value(change)
        assert await script.value(look) == before

    play(scenario)


def test_a_process_takes_no_other_coroutine_when_one_cannot_be_undone(play: Callable[[Scenario], None]) -> None:
    async def lower() -> int:
        import resource

        if os.getuid() == 0:
            os.setuid(65534)  # Root could raise the limit again.
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
        os.umask(0o777)
        return os.getpid()

    async def pid() -> int:
        return os.getpid()

    async def scenario(stream: Stream) -> None:
        script = Script(stream)
        assert await script.value(lower) != await script.value(pid)

    play(scenario)
