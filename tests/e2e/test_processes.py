"""What tasks do to their processes: it ends with them, and neither the next task nor a neighbour notices."""

import argparse
import asyncio
import contextvars
import gc
import io
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lattice_client import LatticeClient, Run, TaskFailedError, task

# Soft limits that a task sets, by their names in `resource`.
LIMITS = {"RLIMIT_NOFILE": 100, "RLIMIT_STACK": 1 << 20, "RLIMIT_FSIZE": 1 << 30, "RLIMIT_CPU": 90_000}
LIMITS |= {"RLIMIT_AS": 1 << 40, "RLIMIT_DATA": 1 << 39, "RLIMIT_NPROC": 5000, "RLIMIT_CORE": 0, "RLIMIT_MEMLOCK": 4096}

level: contextvars.ContextVar[int] = contextvars.ContextVar("level", default=0)


def state() -> tuple[Any, ...]:
    """Return what docs/tasks.md says is put back."""
    import locale
    import logging
    import resource
    import socket
    import tempfile
    import tracemalloc

    return (
        os.getpid(),
        os.getcwd(),
        dict(os.environ),
        os.umask(0o22),
        signal.getitimer(signal.ITIMER_REAL),
        [str(signal.getsignal(number)) for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGUSR1)],
        sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        type(sys.stdout).__name__,
        os.fstat(1).st_ino,
        warnings.filters[0],
        sys.getrecursionlimit(),
        locale.setlocale(locale.LC_ALL),
        (logging.root.level, len(logging.root.handlers), logging.root.manager.disable),
        [resource.getrlimit(getattr(resource, name))[0] for name in LIMITS],
        multiprocessing.get_start_method(allow_none=True),
        time.strftime("%Z", time.localtime(0)),
        (list(sys.path), list(sys.argv)),
        (socket.getdefaulttimeout(), tempfile.gettempdir(), tracemalloc.is_tracing()),
        (sys.getswitchinterval(), sys.get_int_max_str_digits(), gc.get_threshold(), gc.get_debug()),
        (os.getpriority(os.PRIO_PROCESS, 0), sorted(os.sched_getaffinity(0))),
        [hook.__qualname__ for hook in (threading.excepthook, sys.unraisablehook, sys.breakpointhook)],
        sys.gettrace() is None,
        gc.isenabled(),
        level.get(),
    )


def disturb() -> int:
    """Change all of it."""
    import faulthandler
    import locale
    import logging
    import resource
    import socket
    import tempfile
    import tracemalloc

    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)
    os.environ["LEFT"] = "behind"
    os.environ.pop("PATH", None)
    os.umask(0o777)
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(9))
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.alarm(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    warnings.simplefilter("error")
    sys.setrecursionlimit(5000)
    locale.setlocale(locale.LC_ALL, "C.UTF-8")
    logging.disable(logging.CRITICAL)
    logging.root.setLevel(logging.DEBUG)
    for name, soft in LIMITS.items():
        resource.setrlimit(getattr(resource, name), (soft, resource.getrlimit(getattr(resource, name))[1]))
    multiprocessing.set_start_method("forkserver", force=True)
    gc.disable()
    gc.set_threshold(7)
    os.environ["TZ"] = "Asia/Tokyo"
    time.tzset()
    sys.path.insert(0, folder)
    sys.argv = ["other"]
    socket.setdefaulttimeout(0.01)
    tempfile.tempdir = folder
    tracemalloc.start()
    sys.setswitchinterval(0.5)
    sys.set_int_max_str_digits(1000)
    os.nice(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    threading.excepthook = sys.unraisablehook = sys.breakpointhook = disturb  # type: ignore[assignment]
    faulthandler.dump_traceback_later(1, exit=True)
    level.set(7)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # left open, as careless code does
    sys.settrace(lambda *_: None)
    return os.getpid()


def in_one_process(client: LatticeClient, *functions: Callable[[], Any]) -> list[Any]:
    """Run functions one after the other until all of them ran in one process; the pid is part of their result."""
    for _ in range(20):
        results = [client.run_task(function, {})["result"] for function in functions]
        pids = [result[0] if isinstance(result, tuple | list) else result for result in results]
        if len(set(pids)) == 1:
            return results
    raise AssertionError("the functions never shared a process")


def test_a_process_is_put_back_when_a_task_changed_it(client: LatticeClient) -> None:
    before, _, after = in_one_process(client, state, disturb, state)
    assert after == before


def test_a_process_lives_on_when_the_alarm_of_a_task_is_due(client: LatticeClient) -> None:
    def arm() -> int:
        import faulthandler

        signal.alarm(1)
        faulthandler.dump_traceback_later(1, exit=True)
        return os.getpid()

    def later() -> int:
        time.sleep(1.2)
        return os.getpid()

    in_one_process(client, arm, later)


def test_random_numbers_differ_when_a_task_seeds_them(client: LatticeClient) -> None:
    def draw(seed: bool) -> float:
        if seed:
            random.seed(5)
        return random.random()

    workflow = client.create_workflow()
    for number in range(500):
        workflow.add_task(draw, {"seed": number % 50 == 0})
    results = [outputs["result"] for outputs in workflow.run().result().values()]
    others = [value for number, value in enumerate(results) if number % 50]
    assert len(set(others)) == len(others)


def test_random_numbers_of_numpy_differ_when_a_task_seeds_them(client: LatticeClient) -> None:
    def draw() -> float:
        import numpy as np

        drawn = float(np.random.random())
        np.random.seed(5)
        return drawn

    drawn = [client.run_task(draw, {})["result"] for _ in range(20)]
    assert len(set(drawn)) == 20


def logs_of(run: Run) -> str:
    """Return the output of the tasks of a run."""
    return "".join(event.data["text"] for event in run.events() if event.type == "task_log")


def test_half_an_emoji_is_printed_as_an_escape(client: LatticeClient) -> None:
    def speak() -> None:
        print("cut \ud83d")

    workflow = client.create_workflow()
    workflow.add_task(speak)
    assert logs_of(workflow.run()) == "cut \\ud83d\n"


def test_a_stream_that_a_task_wraps_writes_into_its_log(client: LatticeClient) -> None:
    def wrap(number: int) -> int:
        sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8")
        print("é", number)
        gc.collect()
        return os.getpid()

    for number in range(4):
        workflow = client.create_workflow()
        workflow.add_task(wrap, {"number": number})
        assert logs_of(workflow.run()) == f"é {number}\n"


def test_a_module_keeps_its_state_when_a_task_imported_it(client: LatticeClient) -> None:
    def speak() -> int:
        import logging

        from tests.e2e import chatty

        assert chatty.PLACE in sys.path
        logging.getLogger("chatty").info("heard")
        return os.getpid()

    for _ in range(4):
        workflow = client.create_workflow()
        workflow.add_task(task(speak, modules=["tests.e2e.chatty"]))
        assert logs_of(workflow.run()) == "heard\n"


def test_a_task_finds_no_event_loop_of_the_one_before(client: LatticeClient) -> None:
    def run() -> int:
        asyncio.run(asyncio.sleep(0))
        return os.getpid()

    def get() -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            loop = asyncio.get_event_loop_policy().get_event_loop()
        loop.run_until_complete(asyncio.sleep(0))
        return os.getpid()

    in_one_process(client, run, get, run, get)


def test_a_client_in_a_task_dials_the_server_of_the_task(client: LatticeClient) -> None:
    def leaf(number: int) -> int:
        return number * 2

    @task(cpu=0)
    def nested(number: int) -> Any:
        with LatticeClient() as inner:
            return inner.run_task(leaf, {"number": number})["result"]

    workflow = client.create_workflow()
    for number in range(4):
        workflow.add_task(nested, {"number": number})
    assert sorted(found["result"] for found in workflow.run().result(60).values()) == [0, 2, 4, 6]


def test_a_task_has_no_arguments_of_a_program(client: LatticeClient) -> None:
    def parse() -> Any:
        return argparse.ArgumentParser().parse_args().__dict__

    assert client.run_task(parse, {})["result"] == {}


def test_a_forked_child_ends_as_python_ends_a_program(client: LatticeClient) -> None:
    def fork(how: str) -> int:
        import _thread

        pid = os.fork()
        if pid == 0:
            match how:
                case "status":
                    sys.exit(3)
                case "text":
                    sys.exit("gone")
                case "error":
                    raise ValueError("in the child")
                case "interrupt":
                    os.kill(os.getpid(), signal.SIGINT)
                    _thread.interrupt_main()
                    time.sleep(30)
                case _:
                    return 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    expected = {"status": (3, ""), "text": (1, "gone"), "error": (1, "ValueError: in the child"), "return": (0, "")}
    expected["interrupt"] = (1, "KeyboardInterrupt")
    for how, (status, last) in expected.items():
        workflow = client.create_workflow()
        workflow.add_task(fork, {"how": how})
        run = workflow.run()
        assert run.result() == {"result": status}
        assert (logs_of(run).splitlines() or [""])[-1] == last


def test_a_daemon_thread_writes_into_no_other_log_when_its_attempt_has_ended(client: LatticeClient) -> None:
    def start() -> int:
        def speak() -> None:
            while True:
                time.sleep(0.05)
                print("from before")

        threading.Thread(target=speak, daemon=True).start()
        return os.getpid()

    def later() -> int:
        time.sleep(0.5)
        print("mine")
        return os.getpid()

    for _ in range(20):
        pid = client.run_task(start, {})["result"]
        workflow = client.create_workflow()
        workflow.add_task(later)
        run = workflow.run()
        assert logs_of(run) == "mine\n"
        if run.result()["result"] == pid:
            return
    raise AssertionError("the tasks never shared a process")


@pytest.mark.parametrize("how", ["main", "environment", "limit", "user", "group", "groups"])
def test_a_process_is_not_used_again_when_it_cannot_be_put_back(client: LatticeClient, how: str) -> None:
    if how in {"user", "group", "groups"} and os.getuid() != 0:
        pytest.skip("only root may become another user or group")

    def spoil(how: str) -> int:
        import resource

        match how:
            case "main":
                sys.modules["__main__"] = type(sys)("__main__")
            case "environment":
                os.environ["FROM_A_MODULE"] = "1"
                __import__("wave")
            case "user":
                os.setresuid(-1, 65534, -1)
            case "group":
                os.setresgid(-1, 65534, -1)
            case "groups":
                os.setgroups([65534])
            case _:
                resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
                if os.getuid() == 0:
                    os.setuid(65534)  # Root could raise the limit again.
        return os.getpid()

    spoilt = {client.run_task(spoil, {"how": how})["result"] for _ in range(3)}
    assert len(spoilt) == 3
    assert client.run_task(state, {})["result"][0] not in spoilt


def test_children_are_ended_when_their_task_has_ended(client: LatticeClient) -> None:
    def leave() -> list[int]:
        plain = subprocess.Popen(["sleep", "600"])
        own = subprocess.Popen(["env", "-i", "setsid", "/bin/sleep", "600"])
        return [os.getpid(), plain.pid, own.pid]

    def look(pids: list[int]) -> list[int]:
        return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]

    _, *children = client.run_task(leave, {})["result"]
    deadline = time.monotonic() + 30
    while client.run_task(look, {"pids": children})["result"] and time.monotonic() < deadline:
        pass
    assert client.run_task(look, {"pids": children})["result"] == []


def test_a_process_is_not_used_again_when_a_thread_of_the_task_still_runs(client: LatticeClient) -> None:
    def leave() -> int:
        threading.Thread(target=time.sleep, args=(600,)).start()
        return os.getpid()

    used = {client.run_task(leave, {})["result"] for _ in range(3)}
    assert len(used) == 3
    assert client.run_task(state, {})["result"][0] not in used


def test_a_process_is_new_when_a_fresh_one_is_asked_for(client: LatticeClient) -> None:
    @task(fresh_process=True)
    def plain() -> int:
        return os.getpid()

    @task(fresh_process=True)
    async def waits() -> int:
        await asyncio.sleep(0)
        return os.getpid()

    pids = [client.run_task(function, {})["result"] for function in (plain, plain, waits, waits)]
    assert len(set(pids)) == 4


def test_two_tenants_never_share_a_process(address: str) -> None:
    def pid() -> int:
        return os.getpid()

    seen: dict[str, set[int]] = {"a": set(), "b": set()}
    with LatticeClient(address, tenant="a") as one, LatticeClient(address, tenant="b") as other:
        for _ in range(30):
            seen["a"].add(one.run_task(pid, {})["result"])
            seen["b"].add(other.run_task(pid, {})["result"])
    assert not seen["a"] & seen["b"]


class Silent(Exception):
    """An error without a text."""

    def __str__(self) -> str:
        return self.detail  # type: ignore[attr-defined, no-any-return]


class Endless(Exception):
    """An error whose text never comes."""

    def __str__(self) -> str:
        while self.args is not None:
            pass
        return ""


def odd(what: str) -> None:
    """End in an odd way."""
    match what:
        case "surrogate":
            raise ValueError("cut \ud83d")
        case "silent":
            raise Silent
        case "endless":
            raise Endless
        case "cancelled":
            raise asyncio.CancelledError
        case "large":
            raise ValueError("x" * 50_000_000)
        case "exec":
            os.execvp("sleep", ["sleep", "600"])
        case "closes":
            os.closerange(0, 100)
        case "garbage":
            for descriptor in range(3, 20):
                try:
                    os.write(descriptor, b"garbage" * 10)
                except OSError:
                    continue
        case _:
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)


KINDS = {
    "surrogate": "USER_ERROR",
    "silent": "USER_ERROR",
    "endless": "USER_ERROR",
    "cancelled": "USER_ERROR",
    "large": "USER_ERROR",
    "exec": "CRASHED",
    "closes": "CRASHED",
    "garbage": "INTERNAL",
    "parent": "CRASHED",
}


@pytest.mark.parametrize("what", KINDS)
def test_a_task_fails_with_a_kind_and_frees_its_cpu_when_it_ends_abnormally(client: LatticeClient, what: str) -> None:
    with pytest.raises(TaskFailedError) as failed:
        client.run_task(odd, {"what": what})
    assert failed.value.kind == KINDS[what]
    assert len(str(failed.value)) < 128 * 1024
    (node,) = client.nodes()
    assert node.free.cpu == node.capacity.cpu
    assert client.run_task(state, {})["result"][0] > 0


@task(timeout=20)
def close_all() -> Iterator[int]:
    """Yield, so that a thread reads the control socket. Then close all descriptors, as a daemon does, and sleep."""
    yield from range(3000)
    time.sleep(0.5)  # That thread waits then.
    os.closerange(3, 256)
    time.sleep(600)


def test_a_task_fails_when_it_closes_the_control_socket_that_a_thread_reads(client: LatticeClient) -> None:
    with pytest.raises(TaskFailedError) as failed:
        client.run_task(close_all, {})
    assert failed.value.kind == "CRASHED"


@task(retries=2, retry_backoff=0)
async def culprit(how: str) -> None:
    """Take the process of all async tasks down, or block it."""
    await asyncio.sleep(0.2)
    match how:
        case "exit":
            os._exit(3)
        case "callback":
            asyncio.get_running_loop().call_later(0.05, os._exit, 4)
            await asyncio.sleep(60)
        case "inner":
            await asyncio.create_task(leave())


async def leave() -> None:
    """Exit inside a task of the loop."""
    sys.exit(1)


@task
async def neighbour(number: int) -> int:
    """Wait beside the culprit."""
    await asyncio.sleep(1)
    return number


@pytest.mark.parametrize("how", ["exit", "callback", "inner"])
def test_other_coroutines_succeed_when_one_crashes_their_process(client: LatticeClient, how: str) -> None:
    workflow = client.create_workflow(failure_policy="finish_independent")
    neighbours = [workflow.add_task(neighbour, {"number": number}) for number in range(5)]
    bad = workflow.add_task(culprit, {"how": how})
    run = workflow.run()
    assert [run.output(added) for added in neighbours] == list(range(5))
    with pytest.raises(TaskFailedError) as failed:
        run.output(bad)
    assert failed.value.kind == ("USER_ERROR" if how == "inner" else "CRASHED")


@task
async def blocker() -> None:
    """Block the loop, once the others wait in it."""
    await asyncio.sleep(0.2)
    time.sleep(4)


@task(timeout=0.5)
async def short() -> None:
    """Run out of time."""
    await asyncio.sleep(60)


@task(timeout=0.5)
async def stubborn() -> None:
    """Exceed the time limit, and continue."""
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            print("no")


def test_a_coroutine_that_blocks_the_loop_fails_when_another_is_cancelled(client: LatticeClient) -> None:
    workflow = client.create_workflow(failure_policy="finish_independent")
    client.run_task(neighbour, {"number": 0})  # The process has imported this module then.
    kept = workflow.add_task(neighbour, {"number": 1})
    blocking, late = workflow.add_task(blocker), workflow.add_task(short)
    run = workflow.run()
    assert run.output(kept) == 1
    kinds = {}
    for added in (blocking, late):
        with pytest.raises(TaskFailedError) as failed:
            run.output(added)
        kinds[added.task_id] = failed.value.kind
    assert kinds == {blocking.task_id: "CRASHED", late.task_id: "TIMEOUT"}


def test_other_coroutines_continue_when_one_ignores_its_cancellation(client: LatticeClient) -> None:
    workflow = client.create_workflow(failure_policy="finish_independent")
    kept = [workflow.add_task(neighbour, {"number": number}) for number in range(3)]
    workflow.add_task(stubborn)
    run = workflow.run()
    assert [run.output(added) for added in kept] == [0, 1, 2]
    assert {found.attempt for found in client.list_tasks(run)} == {1}, "no task had to run twice"


def test_a_coroutine_that_ignores_its_cancellation_is_not_resumed(client: LatticeClient, tmp_path: Path) -> None:
    @task(timeout=0.3)
    async def writes(path: str) -> None:
        while True:
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                continue
            with open(path, "a") as file:
                file.write("x")

    path = tmp_path / "written"
    path.touch()  # On a busy machine the time is over before the first write.
    with pytest.raises(TaskFailedError):
        client.run_task(writes, {"path": str(path)})
    written = path.read_text()
    client.run_task(neighbour, {"number": 1})  # In the same process, for a second.
    assert path.read_text() == written


def test_output_is_in_the_log_of_its_attempt_when_async_tasks_share_a_process(client: LatticeClient) -> None:
    async def speak(name: str) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, print, f"{name} executor")
        thread = threading.Thread(target=print, args=(f"{name} thread",))
        thread.start()
        thread.join()
        child = await asyncio.create_subprocess_exec("echo", f"{name} child")
        await child.wait()

    workflow = client.create_workflow()
    names = {workflow.add_task(speak, {"name": f"n{number}"}).task_id: f"n{number}" for number in range(4)}
    logs = dict.fromkeys(names, "")
    for event in workflow.run().events():
        if event.type == "task_log":
            logs[event.task_id] += event.data["text"]
    for task_id, name in names.items():
        assert sorted(logs[task_id].splitlines()) == [f"{name} {what}" for what in ("child", "executor", "thread")]


def test_output_of_c_libraries_is_in_the_log_of_the_attempt_that_wrote_it(client: LatticeClient) -> None:
    def speak(name: str) -> int:
        import ctypes

        ctypes.CDLL(None).puts(name.encode())
        return os.getpid()

    workflow = client.create_workflow()
    names = {workflow.add_task(speak, {"name": f"n{number}"}).task_id: f"n{number}" for number in range(20)}
    logs = dict.fromkeys(names, "")
    for event in workflow.run().events():
        if event.type == "task_log":
            logs[event.task_id] += event.data["text"]
    assert logs == {task_id: f"{name}\n" for task_id, name in names.items()}


def test_a_worker_continues_when_a_task_has_stopped_the_parent_of_all_tasks(client: LatticeClient) -> None:
    @task
    def stop_parent() -> None:
        os.kill(os.getppid(), signal.SIGSTOP)

    @task(fresh_process=True)
    def fresh() -> int:
        return 1

    @task(timeout=1)
    def stop_parent_and_sleep() -> None:
        os.kill(os.getppid(), signal.SIGSTOP)
        time.sleep(60)

    client.run_task(stop_parent, {})
    assert client.run_task(fresh, {}, timeout=30) == {"result": 1}
    with pytest.raises(TaskFailedError, match="TIMEOUT"):
        client.run_task(stop_parent_and_sleep, {}, timeout=30)
    assert client.run_task(fresh, {}, timeout=30) == {"result": 1}
