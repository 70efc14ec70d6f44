"""The traceback of a refused call: it has the caller's frames and few of the client."""

import asyncio
import logging
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from lattice_client import (
    AsyncLatticeClient,
    LatticeClient,
    LatticeError,
    NotFoundError,
    TaskDefinitionError,
    TaskFailedError,
    UnavailableError,
    context,
    task,
)
from lattice_client.runs.driver import blocking
from lattice_client.runs.run import AsyncRun
from lattice_client.runs.tracebacks import shorten
from lattice_client.transport import reconnection

ADVICE = "UnavailableError: no Lattice server answers at 127.0.0.1:1: Connection refused; start a server with"


@task
def work(x: int) -> int:
    return x


@pytest.fixture
def stray() -> Iterator[LatticeClient]:
    """A client of an address at which nothing listens."""
    with LatticeClient("127.0.0.1:1") as client:
        yield client


def run(client: Any) -> Any:
    workflow = client.create_workflow()
    workflow.add_task(work, {"x": 1})
    return workflow.run()


def raised(call: Callable[[], object], kind: type[Exception]) -> Exception:
    with pytest.raises(kind) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    "call",
    [
        run,
        lambda client: client.run_task(work, {"x": 1}),
        lambda client: client.get_run("r"),
        lambda client: client.list_runs(),
        lambda client: client.services.list(),
        lambda client: client.open_run("r").__enter__(),
    ],
)
def test_traceback_of_a_refused_connection_is_short(
    stray: LatticeClient, call: Callable[[LatticeClient], object]
) -> None:
    error = raised(lambda: call(stray), UnavailableError)
    text = "".join(traceback.format_exception(error))
    # This test has two to three, a public method one, and `blocking` one.
    assert text.count('  File "') <= 6
    assert text.count("/lattice_client/") <= 2
    assert text.count("Traceback (most recent call last)") == 1
    assert text.splitlines()[-1].startswith(f"lattice_client.errors.{ADVICE}")


@pytest.mark.parametrize(
    "call",
    [
        run,
        lambda client: client.run_task(work, {"x": 1}),
        lambda client: client.run_task(work, {"y": 1}),
        lambda client: client.get_run("r"),
        lambda client: client.services.list(),
        lambda client: client.llm.list(),
        lambda client: anext(client.events("r")),
        lambda client: anext(AsyncRun.of("r", client.api).events()),
        lambda client: AsyncRun.of("r", client.api).result(timeout=0.1),
        lambda client: AsyncRun.of("r", client.api).cancel(),
    ],
)
def test_traceback_of_a_refused_call_in_a_coroutine_is_short(
    call: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconnection, "RECONNECT_S", 0.1)

    async def main() -> None:
        async with AsyncLatticeClient("127.0.0.1:1") as client:
            await call(client)

    with pytest.raises((LatticeError, TimeoutError)) as caught:
        asyncio.run(main())
    text = "".join(traceback.format_exception(caught.value))
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[-2] == "main" or (names[-3:-1] == ["main", "<lambda>"])
    assert text.count("/lattice_client/") == 1
    assert text.count("Traceback (most recent call last)") == 1


def test_asynchronous_generator_is_closed_with_the_loop_over_it() -> None:
    closed = []

    @shorten
    class Numbers:
        async def count(self) -> AsyncIterator[int]:
            try:
                for number in range(3):
                    yield number
            finally:
                closed.append(True)

    async def main() -> None:
        numbers = Numbers().count()
        async for _ in numbers:
            break
        assert not closed
        await numbers.aclose()  # type: ignore[attr-defined]
        assert closed

    asyncio.run(main())


def test_traceback_of_a_program_has_its_line_a_public_method_and_one_frame_more() -> None:
    program = "from lattice_client import LatticeClient\nLatticeClient('127.0.0.1:1').get_run('r')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    lines = done.stderr.splitlines()
    assert [line.rpartition(" ")[2] for line in lines if line.startswith("  File ")] == [
        "<module>",
        "get_run",
        "blocking",
    ]
    assert lines[-1].startswith(f"lattice_client.errors.{ADVICE}")


def refuse() -> None:
    try:
        raise KeyError("x")
    except KeyError as error:
        raise NotFoundError("there is no x") from error


def test_frames_of_the_users_functions_and_the_cause_stay() -> None:
    async def calls_back() -> None:
        refuse()

    error = raised(lambda: blocking(calls_back()), NotFoundError)
    assert isinstance(error.__cause__, KeyError)
    assert [frame.name for frame in traceback.extract_tb(error.__traceback__)][-2:] == ["calls_back", "refuse"]


def test_an_error_that_is_not_of_the_client_keeps_all_frames(stray: LatticeClient) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    stray.twin.api.starter.run_task = fail  # type: ignore[method-assign,assignment]
    error = raised(lambda: stray.run_task(work, {"x": 1}), ZeroDivisionError)
    assert [frame.name for frame in traceback.extract_tb(error.__traceback__)][-6:] == [
        "run_task",
        "blocking",
        "calling",
        "called",
        "run_task",
        "fail",
    ]


def test_frames_of_the_client_are_in_the_debug_log(stray: LatticeClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="lattice_client"):
        raised(lambda: stray.get_run("r"), LatticeError)
    assert "in _converting" in caplog.text


def test_wrong_input_is_refused_with_a_short_traceback(stray: LatticeClient) -> None:
    error = raised(lambda: stray.run_task(work, {"y": 1}), TaskDefinitionError)
    assert "".join(traceback.format_exception(error)).count("/lattice_client/") == 2


def test_traceback_of_a_task_has_no_frames_of_the_worker(client: LatticeClient) -> None:
    @task
    def asks() -> None:
        context.ask("name")

    with pytest.raises(TaskFailedError) as caught:
        client.run_task(asks)
    frames = [line for line in str(caught.value).splitlines() if line.startswith("  File ")]
    assert [frame.rpartition(" ")[2] for frame in frames] == ["asks"]
