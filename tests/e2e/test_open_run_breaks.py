"""Open runs whose stream, caller or worker breaks: lost messages are repeated, and nothing runs twice."""

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lattice_client import (
    AbortedError,
    LatticeClient,
    NotFoundError,
    OpenRun,
    Question,
    RunCancelledError,
    TaskDefinitionError,
    TaskFailedError,
    context,
    task,
)
from tests.e2e.proxy import Proxy
from tests.e2e.rooms import WAIT_S, until
from tests.server.apps import serving_aside

GRACE_S = 1.0
pytestmark = pytest.mark.slow


@task(cpu=0.1)
def note(folder: str, name: str) -> str:
    with (Path(folder) / "notes").open("a") as file:
        file.write(f"{name}\n")
    return name


@task(cpu=0.1)
def ask(value: Any) -> Any:
    return context.ask("q", value)


@task(cpu=0.1)
def sleep() -> None:
    time.sleep(WAIT_S)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server with a worker that cancels open runs soon."""
    with serving_aside(open_run_grace_s=GRACE_S) as found:
        yield found


@pytest.fixture(scope="module")
def patient() -> Iterator[str]:
    """A server with a worker that lets callers be away for as long as it does by default."""
    with serving_aside() as found:
        yield found


@pytest.fixture
def client(address: str) -> Iterator[LatticeClient]:
    """A client of that server."""
    with LatticeClient(address) as found:
        yield found


class Detour:
    """A proxy on a thread of its own, and the synchronous client that goes by it."""

    def __init__(self, proxy: Proxy, loop: asyncio.AbstractEventLoop, client: LatticeClient) -> None:
        self._proxy = proxy
        self._loop = loop
        self.client = client

    def cut(self) -> None:
        """Reset all connections."""
        self._do(self._proxy.cut)

    def _do(self, call: Callable[[], None]) -> None:
        async def run() -> None:
            call()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(WAIT_S)


@contextmanager
def detour(address: str) -> Iterator[Detour]:
    """Go by a proxy while the block runs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    proxy = Proxy(address)
    target = asyncio.run_coroutine_threadsafe(proxy.start(), loop).result(WAIT_S)
    try:
        with LatticeClient(target) as client:
            yield Detour(proxy, loop, client)
    finally:
        asyncio.run_coroutine_threadsafe(proxy.stop(), loop).result(WAIT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_a_stream_that_breaks_is_resumed_and_no_task_runs_twice(patient: str, tmp_path: Path) -> None:
    handled = []

    with detour(patient) as way:

        def answer(question: Question) -> Any:
            handled.append(question.payload)
            way.cut()
            return question.payload + 100

        with way.client.open_run(on_question=answer) as run:
            for step in range(3):
                way.cut()
                added = [run.add(note, {"folder": str(tmp_path), "name": f"{step}-{number}"}) for number in range(2)]
                asked = run.add(ask, {"value": step})
                way.cut()
                assert [run.output(one) for one in added] == [f"{step}-{number}" for number in range(2)]
                assert run.output(asked, timeout=WAIT_S) == step + 100
    assert handled == list(range(3))
    names = sorted(f"{step}-{number}" for step in range(3) for number in range(2))
    assert sorted((tmp_path / "notes").read_text().split()) == names


def test_an_asyncio_caller_resumes_too(patient: str, tmp_path: Path) -> None:
    handled = []

    async def scenario() -> None:
        proxy = Proxy(patient)
        target = await proxy.start()

        async def answer(question: Question) -> Any:
            handled.append(question.payload)
            proxy.cut()
            await asyncio.sleep(0)
            return question.payload + 100

        client = LatticeClient(target)
        async with client.aio.open_run(on_question=answer) as run:
            for step in range(6):
                one = await run.add(note, {"folder": str(tmp_path), "name": f"{step}"})
                two = await run.add(ask, {"value": step})
                proxy.cut()
                assert await asyncio.gather(run.output(one), run.output(two)) == [str(step), step + 100]
        await client.aio.close()
        client.close()
        await proxy.stop()

    asyncio.run(scenario())
    assert handled == list(range(6))
    assert sorted((tmp_path / "notes").read_text().split()) == [str(step) for step in range(6)]


def test_a_run_is_cancelled_when_its_caller_does_not_return(client: LatticeClient) -> None:
    run = client.open_run()
    blocked = run.add(sleep)
    asked = run.add(ask, {"value": 1})
    until(run, "task_started", blocked.task_id, asked.task_id)
    run.twin.caller_stream.abandon()
    with pytest.raises(RunCancelledError, match="did not come back within 1 s"):
        client.get_run(run).result(timeout=WAIT_S)
    states = {found.task_id: found.state for found in client.list_tasks(run)}
    assert set(states) == {blocked.task_id, asked.task_id}
    (node,) = client.nodes()
    assert node.free.cpu == node.capacity.cpu


def test_a_handle_that_is_dropped_leaves_its_run(client: LatticeClient) -> None:
    async def drop() -> str:
        run = await client.aio.open_run()
        await run.add(sleep)
        return str(run)

    run_ids = [str(client.open_run())]

    async def scenario() -> None:
        run_ids.append(await drop())
        gc.collect()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for run_id in run_ids:
            with pytest.raises(RunCancelledError, match="did not come back"):
                await (await client.aio.get_run(run_id)).result(WAIT_S)
        await client.aio.close()

    gc.collect()
    asyncio.run(scenario())


def test_a_block_that_raises_cancels_its_run(client: LatticeClient) -> None:
    run = client.open_run()
    with pytest.raises(ZeroDivisionError), run:
        raise ZeroDivisionError
    with pytest.raises(RunCancelledError, match="raised ZeroDivisionError"):
        client.get_run(run).result(timeout=WAIT_S)


def test_an_unread_failure_is_raised_at_the_end_of_the_block(client: LatticeClient) -> None:
    def fail() -> None:
        raise LookupError("unseen")

    with pytest.raises(TaskFailedError, match="unseen"), client.open_run() as run:
        run.add(fail)
    with client.open_run() as run, pytest.raises(TaskFailedError, match="unseen"):
        run.output(run.add(fail))
    with pytest.raises(TaskFailedError, match="unseen"):
        client.get_run(run).result(timeout=WAIT_S)


def test_an_open_run_stays_open_when_a_wait_times_out(client: LatticeClient) -> None:
    with client.open_run() as run:
        asked = run.add(ask, {"value": 1})
        for _ in range(3):
            with pytest.raises(TimeoutError):
                run.output(asked, timeout=0.05)
        time.sleep(1.5 * GRACE_S)
        question = next(run.questions(timeout=WAIT_S))
        question.answer("late")
        assert run.output(asked, timeout=WAIT_S) == "late"


def test_ctrl_c_ends_a_wait_and_the_run(client: LatticeClient) -> None:
    main = threading.get_ident()

    def interrupted(run: OpenRun) -> None:
        slow = run.add(sleep)
        with run:
            threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)).start()
            run.output(slow)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run = client.open_run()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            interrupted(run)
        assert time.monotonic() - started < WAIT_S / 2
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(RunCancelledError, match="raised KeyboardInterrupt"):
        client.get_run(run).result(timeout=WAIT_S)


def test_a_retried_attempt_asks_again_when_its_worker_dies(client: LatticeClient) -> None:
    @task(retries=1, retry_backoff=0.0)
    def ask_twice() -> Any:
        return context.ask("pid", os.getpid())

    with client.open_run() as run:
        asked = run.add(ask_twice)
        questions = run.questions(timeout=WAIT_S)
        first = next(questions)
        os.kill(first.payload, signal.SIGKILL)
        second = next(questions)
        assert (first.attempt, second.attempt, first.is_withdrawn) == (1, 2, True)
        assert not first.answer("too late")
        assert second.answer("in time")
        assert run.output(asked) == "in time"


def test_a_handler_adds_tasks_and_waits_for_them(client: LatticeClient, tmp_path: Path) -> None:
    def answer(question: Question) -> Any:
        if question.payload == 0:
            return "done"
        return run.output(run.add(ask, {"value": question.payload - 1}))

    run = client.open_run(on_question=answer)
    with run:
        assert run.output(run.add(ask, {"value": 3}), timeout=WAIT_S) == "done"


def test_threads_share_an_open_run(client: LatticeClient) -> None:
    def answer(question: Question) -> Any:
        return question.payload

    results: dict[int, Any] = {}
    with client.open_run(on_question=answer) as run:

        def work(number: int) -> None:
            results[number] = run.output(run.add(ask, {"value": number}), timeout=WAIT_S)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {number: number for number in range(8)}


def test_an_open_run_that_is_taken_over_tells_its_first_caller(client: LatticeClient) -> None:
    run = client.open_run()
    other = client.open_run(run_id=str(run))
    with pytest.raises(AbortedError) as caught:
        run.add(sleep)
    assert caught.value.reason == "RUN_TAKEN_OVER"
    other.close()


def test_invalid_arguments_of_an_open_run_are_named(client: LatticeClient) -> None:
    async def answer(question: Question) -> Any:
        return None

    with pytest.raises(TaskDefinitionError, match="plain function"):
        client.open_run(on_question=answer)
    with pytest.raises(TaskDefinitionError, match="has no setting 'paramters'"):
        client.open_run(paramters={})  # type: ignore[call-arg]
    with client.open_run(on_question=lambda question: bytes(2_000_000)) as run:
        with pytest.raises(NotFoundError):
            run.output("nobody", timeout=WAIT_S)
        with pytest.raises(TaskFailedError, match="the limit is 1048576"):
            run.output(run.add(ask, {"value": 1}))
        with pytest.raises(TaskFailedError, match="questions travel inline and may have 1048576"):
            run.output(run.add(ask, {"value": bytes(2_000_000)}))
        with pytest.raises(TaskDefinitionError):
            run.add(ask, {"valu": 1})
