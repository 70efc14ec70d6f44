"""Reading a run: a server that stops and restarts, time limits, and Ctrl-C."""

import asyncio
import contextlib
import gc
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from lattice.v1 import results_pb2, results_pb2_grpc, run_pb2, workflow_pb2, workflow_pb2_grpc

from lattice_client import AsyncLatticeClient, LatticeClient, NotFoundError, Run, UnavailableError, errors
from lattice_client.runs.run import AsyncRun
from lattice_client.transport import reconnection
from lattice_client.transport.channel import dial
from lattice_client.transport.reconnection import Reconnection
from lattice_client.transport.suspending import AsyncChannel
from tests.client.shell import WAIT_S, call
from tests.commands import LATTICE
from tests.ports import free_port
from tests.server.apps import NoWorkers, serving_aside

SHORT_S = 1.0


class Endless(workflow_pb2_grpc.WorkflowServiceServicer, results_pb2_grpc.ResultsServiceServicer):
    """Has one run that does not end, until it is told that there is none."""

    def __init__(self) -> None:
        self.watched = asyncio.Event()
        self.has_run = True

    async def GetRun(self, request: Any, context: Any) -> workflow_pb2.GetRunResponse:
        """Return the run."""
        return workflow_pb2.GetRunResponse(run=run_pb2.Run(run_id="r", state=run_pb2.RUN_STATE_RUNNING))

    async def GetResult(self, request: Any, context: Any) -> results_pb2.GetResultResponse:
        """Wait for the end."""
        await self._wait(context)
        return results_pb2.GetResultResponse()

    async def WatchRun(self, request: Any, context: Any) -> AsyncIterator[results_pb2.WatchRunResponse]:
        """Say that the run is there, and no more."""
        yield results_pb2.WatchRunResponse(sequence=1)
        await self._wait(context)

    async def _wait(self, context: Any) -> None:
        self.watched.set()
        if not self.has_run:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no run 'r'")
        await asyncio.Event().wait()


async def serve(port: int, served: Endless) -> grpc.aio.Server:
    server = grpc.aio.server()
    workflow_pb2_grpc.add_WorkflowServiceServicer_to_server(served, server)
    results_pb2_grpc.add_ResultsServiceServicer_to_server(served, server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server


async def read_events(client: AsyncLatticeClient) -> None:
    async for _ in client.events("r"):
        pass


async def read_results(client: AsyncLatticeClient) -> None:
    await client.get_workflow("w").get_results("r")


async def read_result(client: AsyncLatticeClient) -> None:
    await AsyncRun.of("r", client.api).result()


async def watch(client: AsyncLatticeClient) -> None:
    done = await asyncio.to_thread(call, client.target, "runs", "watch", "r")
    assert done.exit_code == 1
    assert done.stderr.count("reconnecting") == 1
    raise UnavailableError(done.stderr)


WAYS = [read_events, read_results, read_result, watch]


@pytest.mark.parametrize("way", WAYS)
def test_readers_raise_unavailable_when_the_server_stays_away(
    way: Callable[[AsyncLatticeClient], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconnection, "RECONNECT_S", SHORT_S)

    async def scenario() -> None:
        port, served = free_port(), Endless()
        server = await serve(port, served)
        async with asyncio.timeout(WAIT_S), AsyncLatticeClient(f"127.0.0.1:{port}") as client:
            reading = asyncio.create_task(way(client))
            await served.watched.wait()
            await server.stop(None)
            stopped = time.monotonic()
            with pytest.raises(UnavailableError) as caught:
                await reading
            assert SHORT_S <= time.monotonic() - stopped < 10 * SHORT_S
        text = str(caught.value)
        for part in (
            "run 'r' cannot be read",
            "tries in 1 s",
            f"127.0.0.1:{port}",
            "may still be running",
            "get_run('r')",
        ):
            assert part in text

    asyncio.run(scenario())


@pytest.mark.parametrize("way", WAYS[:3])
def test_readers_raise_not_found_when_a_restarted_server_lacks_the_run(
    way: Callable[[AsyncLatticeClient], Any],
) -> None:
    async def scenario() -> None:
        port, served = free_port(), Endless()
        server = await serve(port, served)
        async with asyncio.timeout(WAIT_S), AsyncLatticeClient(f"127.0.0.1:{port}") as client:
            reading = asyncio.create_task(way(client))
            await served.watched.wait()
            await server.stop(None)
            other = Endless()
            other.has_run = False
            server = await serve(port, other)
            with pytest.raises(NotFoundError, match="a server without a journal forgets all runs"):
                await reading
            await server.stop(None)

    asyncio.run(scenario())


def test_reconnection_restarts_its_time_limit_when_the_server_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[errors.RequestError] = []
    error = UnavailableError("no way")
    error.code = grpc.StatusCode.UNAVAILABLE
    times = iter([0.0, 20.0, 100.0, 129.0, 131.0])
    channel = AsyncChannel(dial("127.0.0.1:1"))

    async def at_once(seconds: float) -> None:
        assert 0 <= seconds <= reconnection.MAX_BACKOFF_S

    async def scenario() -> None:
        reconnecting = Reconnection(channel, "r", told.append)
        await reconnecting.wait(error)
        await reconnecting.wait(error)
        reconnecting.succeeded()
        await reconnecting.wait(error)
        await reconnecting.wait(error)
        assert len(told) == 2
        with pytest.raises(UnavailableError, match="3 tries in 30 s"):
            await reconnecting.wait(error)

    monkeypatch.setattr(channel, "now", lambda: next(times))
    monkeypatch.setattr(channel, "sleep", at_once)
    asyncio.run(scenario())


@contextmanager
def running() -> Iterator[tuple[str, Run]]:
    """The address of a server, and a run there that waits for ever."""
    with serving_aside(NoWorkers()) as address, LatticeClient(address) as client:
        workflow = client.create_workflow()
        workflow.add_task(lambda: 1)
        yield address, workflow.run()


def test_timeout_error_names_the_run_and_that_it_continues() -> None:
    with running() as (address, run), LatticeClient(address) as client:
        for follow in (
            lambda: run.result(timeout=0.05),
            lambda: list(run.events(timeout=0.05)),
            lambda: client.get_workflow("w").get_results(run, verbose=False, timeout=0.05),
            lambda: asyncio.run(_results(address, run)),
            lambda: asyncio.run(_result(address, run)),
        ):
            with pytest.raises(TimeoutError) as caught:
                follow()
            assert str(caught.value) == f"run '{run}' did not end within 0.05 s; it continues: wait again, or cancel it"
        assert run.status() == "running"


async def _results(address: str, run_id: str) -> None:
    async with AsyncLatticeClient(address) as client:
        await client.get_workflow("w").get_results(run_id, verbose=False, timeout=0.05)


async def _result(address: str, run_id: str) -> None:
    async with AsyncLatticeClient(address) as client:
        await (await client.get_run(run_id)).result(timeout=0.05)


# It prints a line when its main thread stays at one instruction of a call.
SCRIPT = """
import signal, sys, threading, time, traceback
signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell starts background jobs with it ignored.
from lattice_client import LatticeClient

def tell():
    seen = []
    while len(seen) < 10 or len(set(seen[-10:])) > 1 or not seen[-1]:
        time.sleep(0.02)
        frame = sys._current_frames()[threading.main_thread().ident]
        is_calling = any(found.f_code.co_name == "calling" for found, _ in traceback.walk_stack(frame))
        seen.append(is_calling and (frame.f_code, frame.f_lasti))
    print("waiting", flush=True)

with LatticeClient(sys.argv[1]) as client:
    run = client.get_run(sys.argv[2])
    threading.Thread(target=tell).start()
    {follow}
"""


def interrupted(follow: str, address: str, run_id: str, is_due: Callable[[], bool] = lambda: True) -> str:
    """Return the stderr of a program that Ctrl-C ends, once that is due, while it follows a run."""
    command = [sys.executable, "-c", SCRIPT.format(follow=follow), address, run_id]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        while not is_due():
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=WAIT_S)
    return told


def test_interrupt_has_a_note_that_the_run_of_a_task_continues() -> None:
    with running() as (address, run), LatticeClient(address) as client:

        def started() -> list[str]:
            return [found.run_id for found in client.list_runs() if found.run_id != run]

        told = interrupted("client.run_task(lambda: 1)", address, run, lambda: bool(started()))
        (run_id,) = started()
    note = f"run '{run_id}' continues if it was started; `lattice runs cancel {run_id}` would end it"
    assert told.endswith(f"KeyboardInterrupt\n{note}\n")


@pytest.mark.parametrize(
    "follow",
    [
        "run.result(cancel_on_disconnect=True)",
        "client.run_task(lambda: 1, cancel_on_disconnect=True)",
        "w = client.create_workflow(); w.add_task(lambda: 1); w.run(cancel_on_disconnect=True).result()",
        "w = client.create_workflow(); w.add_task(lambda: 1); list(w.run(cancel_on_disconnect=True).events())",
        "opened = client.open_run(); opened.output(opened.add(lambda: 1))",
    ],
)
def test_interrupt_has_no_note_when_the_run_ends_with_its_caller(follow: str) -> None:
    with running() as (address, run):
        assert interrupted(follow, address, run).endswith("\nKeyboardInterrupt\n")


@pytest.mark.parametrize("follow", ["run.result()", "list(run.events())"])
def test_interrupt_has_a_note_that_the_run_continues(follow: str) -> None:
    with running() as (address, run):
        told = interrupted(follow, address, run)
        assert told.endswith(f"KeyboardInterrupt\nrun '{run}' continues; `lattice runs cancel {run}` would end it\n")
        assert told.count("Traceback") == 1
        assert "concurrent/futures" not in told
        assert run.status() == "running"


async def all_of(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


@pytest.mark.parametrize(
    ("follow", "is_tied"),
    [
        (lambda run: run.result(), False),
        (lambda run: run.output("t"), False),
        (lambda run: all_of(run.events()), False),
        (lambda run: all_of(run.chunks()), False),
        (lambda run: run.result(cancel_on_disconnect=True), True),
    ],
)
def test_cancelled_coroutine_has_a_note_that_the_run_continues(
    follow: Callable[[AsyncRun], Coroutine[Any, Any, Any]], is_tied: bool
) -> None:
    async def scenario(address: str, run_id: str) -> BaseException:
        async with AsyncLatticeClient(address) as client:
            waiting = asyncio.create_task(follow(await client.get_run(run_id)))
            await asyncio.sleep(0)  # its first step
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await waiting
            return caught.value

    with running() as (address, run):
        error = asyncio.run(scenario(address, run))
    note = f"run '{run}' continues; `lattice runs cancel {run}` would end it"
    assert getattr(error, "__notes__", []) == ([] if is_tied else [note])
    assert "".join(traceback.format_exception(error)).count("/lattice_client/") <= 2


def test_a_run_that_its_caller_drops_leaves_no_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def drop(address: str) -> None:
        async with AsyncLatticeClient(address) as client:
            workflow = client.create_workflow()
            workflow.add_task(lambda: 1)
            run = await workflow.run(cancel_on_disconnect=0.01)
            run_id = run.run_id
            del run
            gc.collect()
            with pytest.raises(errors.RunCancelledError):
                await (await client.get_run(run_id)).result()

    with serving_aside(NoWorkers()) as address:
        asyncio.run(drop(address))
    assert not [record for record in caplog.records if record.name.startswith("lattice_client")]


def test_watch_names_the_address_when_no_server_answers_at_first() -> None:
    done = subprocess.run(
        [LATTICE, "runs", "watch", "r", "--addr", "127.0.0.1:1"], capture_output=True, text=True, check=False
    )
    assert done.stderr.startswith("Error: no Lattice server answers at 127.0.0.1:1: start one with")


def test_a_failing_call_raises_cancelled_error_when_its_task_is_cancelled() -> None:
    async def method(_: object) -> None:
        """Fail when the task is cancelled, as a call of gRPC may."""
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.get_running_loop().create_future()
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata())

    async def scenario() -> None:
        async with AsyncLatticeClient("127.0.0.1:1") as client:
            channel: Any = client.api.channel
            calling = asyncio.create_task(channel.call(method, None))
            await asyncio.sleep(0)
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling

    asyncio.run(scenario())
