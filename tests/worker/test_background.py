"""Tasks in the background of a worker: the failure of each has a consequence, and no lease waits for a dead part."""

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import h11
import pytest
from lattice.v1 import errors_pb2, worker_pb2

from lattice_worker import background, context
from lattice_worker.attempts import outcomes
from lattice_worker.attempts.attempt_reports import AttemptReports
from lattice_worker.attempts.questions import Questions
from lattice_worker.egress.exchange import Exchange
from lattice_worker.egress.streams import Peer
from lattice_worker.pool.crash import Crash
from lattice_worker.pool.runner_pool import Pool
from lattice_worker.services import instance
from lattice_worker.session.limits import Limits
from lattice_worker.store.artifact_staging import ArtifactStaging
from tests.worker.head import TIMEOUT_S, pair
from tests.worker.processes import FakeProcess, settle
from tests.worker.test_frames import Scene

INTERNAL = errors_pb2.FAILURE_KIND_INTERNAL
Injected = Callable[..., Any]


async def fail() -> None:
    raise ValueError("a bug")


async def wait_for(future: "asyncio.Future[None]") -> None:
    await future


def once(original: Injected, error: BaseException | None = None) -> Injected:
    """Return a function that raises at its first call, and calls the original from the second call on."""
    errors = [error or ValueError("a bug")]

    def injected(*args: Any, **named: Any) -> Any:
        if errors:
            raise errors.pop()
        return original(*args, **named)

    return injected


def test_owner_is_told_and_the_error_is_logged_when_a_task_fails(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        told: list[BaseException] = []
        await asyncio.wait([background.start(fail(), told.append)])
        assert [str(error) for error in told] == ["a bug"]

    asyncio.run(scenario())
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.exc_info is not None
    assert "fail" in record.getMessage()


def test_cancellation_is_a_failure_unless_it_was_requested() -> None:
    async def scenario() -> None:
        told: list[BaseException] = []
        awaited: list[asyncio.Future[None]] = [asyncio.get_running_loop().create_future() for _ in range(2)]
        tasks = [background.start(wait_for(future), told.append) for future in awaited]
        await asyncio.sleep(0)
        tasks[0].cancel()
        awaited[1].cancel()
        await asyncio.wait(tasks)
        assert [type(error) for error in told] == [asyncio.CancelledError]

    asyncio.run(scenario())


def test_shared_task_tells_the_callers_that_await_it_and_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        shared, left = background.share(fail()), background.share(fail())
        with pytest.raises(ValueError, match="a bug"):
            await shared
        await asyncio.wait([left])

    asyncio.run(scenario())
    assert not caplog.records


def end_of_lease(folder: Path, then: Callable[[FakeProcess], None] = lambda process: None) -> tuple[str, int]:
    """Run one lease on a process that answers, or does `then` instead; return how it ended and as which failure."""
    found: list[tuple[str, int]] = []

    async def scenario() -> None:
        staging = ArtifactStaging(str(folder))
        with staging.opened():
            scene = Scene(staging, folder)
            scene.zygotes.is_silent = then.__name__ != "<lambda>"
            scene.assign("a", 1, is_async=False)
            if scene.zygotes.is_silent:
                await settle(lambda: any(process.invocations for process in scene.zygotes.processes))
                then(next(process for process in scene.zygotes.processes if process.invocations))
            async with asyncio.timeout(TIMEOUT_S):
                while not scene.ended["a"]:
                    await asyncio.sleep(0.001)
            ((_, _, fact),) = scene.ends
            found.append((fact, scene.kinds.get("a", 0)))
            assert scene.executor.is_idle
            assert scene.ended["a"] == 1
            scene.pool.close()
            await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)

    asyncio.run(scenario())
    return found[0]


def test_lease_ends_as_internal_when_its_answer_cannot_be_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "reports_of", once(outcomes.reports_of))
    assert end_of_lease(tmp_path) == ("failed", INTERNAL)


def test_lease_ends_as_internal_when_the_conversion_in_the_background_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lattice_worker.attempts.attempt_reports.LARGE_ANSWER_BLOBS", 1)
    monkeypatch.setattr(AttemptReports, "_report_end", once(AttemptReports._report_end))
    assert end_of_lease(tmp_path) == ("failed", INTERNAL)


@pytest.mark.parametrize("error", [ValueError("a bug"), asyncio.CancelledError()], ids=repr)
def test_lease_ends_when_the_start_of_its_process_fails_or_is_cancelled(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pool, "take_idle", lambda pool, key: None)
    monkeypatch.setattr(Pool, "take", once(Pool.take, error))
    assert end_of_lease(tmp_path)[0] == "failed"


def test_lease_ends_as_internal_when_the_end_of_its_process_cannot_be_handled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(process: FakeProcess) -> None:
        process.end(-9)

    monkeypatch.setattr(Crash, "end", once(Crash.end))
    assert end_of_lease(tmp_path, end) == ("failed", INTERNAL)


def test_call_fails_when_the_value_of_its_answer_cannot_be_fetched() -> None:
    async def scenario() -> None:
        async def fetch() -> None:
            await asyncio.get_running_loop().create_future()

        fetching = asyncio.create_task(fetch())
        answers: list[dict[str, Any]] = []
        runner = SimpleNamespace(sandbox=None, answer=lambda lease, header, blobs: answers.append(header))
        store = SimpleNamespace(fetching=lambda payloads: [fetching])
        questions = Questions(lambda report: None, Limits(), cast(Any, store))
        asked = {"kind": "await", "number": 1, "task": "t"}
        questions.ask(worker_pb2.Assignment(lease_id="a"), cast(Any, runner), asked, [])
        answer = worker_pb2.Answer(lease_id="a", number=1)
        answer.outputs.SetInParent()
        questions.answer(answer)
        await asyncio.sleep(0)
        fetching.cancel()
        await settle(lambda: bool(answers))
        assert answers[0]["failure"]["message"].startswith("the value of the called task could not be fetched")

    asyncio.run(scenario())


BROKEN_BEAT = """
from lattice_worker import agent
from lattice_worker.cli import main

beat, errors = agent.Agent._beat, [ValueError("a bug")]

async def broken(self, call):
    if errors and self._is_welcome:
        raise errors.pop()
    await beat(self, call)

agent.FIRST_BEAT_S = 0.01
async def first(self, call):
    import asyncio
    while not self._is_welcome:
        await asyncio.sleep(0.01)
    await broken(self, call)

agent.Agent._beat = first
main()
"""


@pytest.mark.slow
def test_worker_connects_again_when_its_heartbeats_fail(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with pair(tmp_path, program=("-c", BROKEN_BEAT)) as both, asyncio.timeout(TIMEOUT_S):
            _, hello = await both.head.dialled()
            assert hello.session_id == "s1"

    asyncio.run(scenario())


PROGRAM: dict[str, Any] = {
    "command": ["sleep", "600"],
    "function": "",
    "entrypoint": "",
    "environment": {},
    "secrets": [],
    "threads": 1,
    "reach": "node",
    "working_directory": "",
    "health": {"http_path": "", "interval_s": 1.0, "timeout_s": 1.0},
}


def run_instance(monkeypatch: pytest.MonkeyPatch, ask: Callable[..., Coroutine[Any, Any, Any]]) -> dict[str, Any]:
    monkeypatch.setattr(context, "ask_async", ask)

    async def scenario() -> dict[str, Any]:
        async with asyncio.timeout(TIMEOUT_S):
            return await instance.Instance(PROGRAM).run()

    return asyncio.run(scenario())


def test_instance_fails_and_its_program_ends_when_a_part_of_its_supervision_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def ask(name: str, value: Any = None) -> Any:
        return await asyncio.get_running_loop().create_future() if name.endswith("control") else {}

    monkeypatch.setattr("lattice_worker.services.health.check", once(lambda: None))
    with pytest.raises(RuntimeError, match="the program could not be supervised"):
        run_instance(monkeypatch, ask)


def test_instance_ends_its_program_when_the_server_refuses_its_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(name: str, value: Any = None) -> Any:
        if name.endswith("control"):
            return await asyncio.get_running_loop().create_future()
        raise context.QuestionError("there is no such instance")

    async def check(*_: Any) -> None:
        """Find it ready."""

    monkeypatch.setattr("lattice_worker.services.health.check", check)
    monkeypatch.setattr("lattice_worker.services.health.check_owner", lambda *_: None)
    assert run_instance(monkeypatch, ask)["exit_status"] < 0


def test_server_gets_the_end_of_a_body_that_the_client_sends_malformed() -> None:
    async def scenario() -> bytes:
        near, client = socket.socketpair()
        far, server = socket.socketpair()
        client.setblocking(False)
        server.setblocking(False)
        loop = asyncio.get_running_loop()
        head = b"POST / HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\r\n\r\n"
        async with asyncio.timeout(TIMEOUT_S), Peer(near) as one, Peer(far) as other:
            exchange = Exchange(one, head + b"5\r\nhello\r\nno size\r\n")
            running = asyncio.create_task(exchange.run(other, await exchange.request()))
            received = b""
            while data := await loop.sock_recv(server, 65536):
                received += data
            server.close()
            await asyncio.wait([running])
            assert isinstance(running.exception(), h11.ProtocolError | None)
        client.close()
        return received

    assert b"hello" in asyncio.run(scenario())
