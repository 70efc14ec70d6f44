"""Encoding and decoding values in a client: the thread that does it, and the errors of values that fail."""

import asyncio
import pickle
import sys
import threading
import time
from collections.abc import AsyncIterator
from typing import Any, Self

import grpc
import pytest
from google.rpc import code_pb2
from lattice.v1 import artifact_pb2, payload_pb2, results_pb2, run_pb2

from lattice_client import (
    AsyncLatticeClient,
    AsyncRun,
    DecodeError,
    InvalidArgumentError,
    LatticeClient,
    ResourceExhaustedError,
    Run,
    TaskDefinitionError,
    TaskFailedError,
    UnavailableError,
    task,
)
from tests.client import test_calls
from tests.client.shell import WAIT_S

LARGE = b"x" * 20_000_000


@task
def thrown() -> None:
    raise Odd("one", "two")


class Odd(Exception):
    """Cannot be rebuilt from its arguments."""

    def __new__(cls, first: str, second: str) -> Self:
        return super().__new__(cls)

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


class Status(Exception):
    """Keeps other arguments than it was made with, as many clients of web services do."""

    def __init__(self, message: str, *, code: int, response: Any) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.response = code, response


@task
def refused() -> None:
    raise Status("too many requests", code=429, response=threading.Lock())


@task
def refused_twice() -> None:
    raise ExceptionGroup("both", [Status("gone", code=410, response=None), Status("late", code=408, response=None)])


class Locked(Exception):
    """Cannot be pickled."""

    def __reduce__(self) -> Any:
        return Locked, (threading.Lock(),)


@task
def unpicklable() -> None:
    raise Locked("has a lock")


@task
def echo(value: Any) -> Any:
    return type(value).__name__, value


class Called:
    """Calls a function wherever it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@task
def sleepy(seconds: float) -> Any:
    return Called(time.sleep, seconds)


@task
def leaving() -> Any:
    return Called(sys.exit, "good bye")


@task
def threads() -> Any:
    return {"value": (Called(threading.current_thread),)}


def test_a_value_is_read_in_the_thread_of_its_reader(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    workflow.add_task(threads)
    run = workflow.run()
    here = threading.current_thread()
    assert run.result(timeout=WAIT_S)["result"] == {"value": (here,)}
    assert client.run_task(threads, {})["result"] == {"value": (here,)}
    (event,) = [event for event in run.events() if event.type == "task_succeeded"]
    assert event.data["outputs"]["result"] == {"value": (here,)}
    messages = workflow.get_results(run, verbose=False)
    assert [m["data"]["result"] for m in messages if m["type"] == "finish_task"] == [{"result": {"value": (here,)}}]


def test_a_value_that_is_slow_to_read_holds_up_its_reader_only(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    workflow.add_task(sleepy, {"seconds": 3.0})
    run = workflow.run()
    while run.status() == "running":
        time.sleep(0.02)
    reader = threading.Thread(target=run.result)
    reader.start()
    calls = 0
    while reader.is_alive():
        client.server_info()
        calls += reader.is_alive()
        time.sleep(0.02)
    # Some may have been made before the value was there to be read.
    assert calls > 5


class Sealed:
    """Says in which thread it was encoded."""

    def __getstate__(self) -> dict[str, str]:
        return {"thread": threading.current_thread().name}


@task
def thread_of(sealed: Any) -> str:
    return str(sealed.thread)


def test_an_input_is_encoded_in_the_thread_of_its_caller(client: LatticeClient) -> None:
    here = {"result": threading.current_thread().name}
    assert client.run_task(thread_of, {"sealed": Sealed()}) == here
    workflow = client.create_workflow()
    workflow.add_task(thread_of, {"sealed": Sealed()})
    assert workflow.run().result(timeout=WAIT_S) == here


def test_decoding_raises_decode_error_when_the_value_raises_system_exit(client: LatticeClient, address: str) -> None:
    workflow = client.create_workflow()
    workflow.add_task(leaving)
    run = workflow.run()
    for read in (
        lambda: run.result(timeout=WAIT_S),
        lambda: client.run_task(leaving, {}),
        lambda: list(run.events()),
        lambda: asyncio.run(_result(address, run)),
    ):
        with pytest.raises(DecodeError, match="cannot be decoded here: SystemExit: good bye") as caught:
            read()
        assert isinstance(caught.value.__cause__, SystemExit)
    assert client.server_info().executor == "local"


async def _result(address: str, run_id: str) -> Any:
    async with AsyncLatticeClient(address) as client:
        return await (await client.get_run(run_id)).result()


@pytest.mark.parametrize("definition", [thrown, unpicklable], ids=["two arguments", "a lock"])
def test_error_explains_why_the_original_exception_is_missing(client: LatticeClient, definition: Any) -> None:
    with pytest.raises(TaskFailedError) as caught:
        client.run_task(definition, {})
    assert caught.value.__cause__ is None
    text = str(caught.value)
    if definition is thrown:
        assert "The original exception could not be rebuilt here: TypeError: " in text
        assert "second" in text.partition("rebuilt here")[2].partition("\n")[0]
    else:
        assert "The worker sent the original exception as text only: it could not be pickled, or" in text
    assert "Remote traceback:" in text


def test_exception_with_a_constructor_of_its_own_is_the_cause(client: LatticeClient) -> None:
    with pytest.raises(TaskFailedError) as caught:
        client.run_task(refused)
    cause = caught.value.__cause__
    assert isinstance(cause, Status)
    assert (str(cause), cause.code, hasattr(cause, "response")) == ("429: too many requests", 429, False)
    assert cause.__notes__ == ["not sent by the worker, because it cannot be pickled: response"]
    with pytest.raises(TaskFailedError) as caught:
        client.run_task(refused_twice)
    group = caught.value.__cause__
    assert isinstance(group, ExceptionGroup)
    assert [(str(error), getattr(error, "code", 0)) for error in group.exceptions] == [
        ("410: gone", 410),
        ("408: late", 408),
    ]


def test_error_has_the_number_of_failed_tasks(client: LatticeClient) -> None:
    workflow = client.create_workflow(failure_policy="finish_independent")
    for _ in range(3):
        workflow.add_task(unpicklable)
    run = workflow.run()
    with pytest.raises(TaskFailedError, match="3 tasks of the run failed") as caught:
        run.result(timeout=WAIT_S)
    assert caught.value.failed_tasks == 3
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.run_id, again.kind) == (str(caught.value), run, "USER_ERROR")


def test_json_nested_too_deep_is_an_error_of_this_package(client: LatticeClient) -> None:
    task_run = run_pb2.TaskRun(task_id="t", state=run_pb2.TASK_STATE_SUCCEEDED)
    deep = payload_pb2.Payload(media_type="application/json", json="[" * 200_000 + "]" * 200_000)
    task_run.outputs["result"].CopyFrom(deep)
    run = run_pb2.Run(run_id="r", state=run_pb2.RUN_STATE_SUCCEEDED)
    found = results_pb2.GetResultResponse(run=run, final_tasks=[task_run])
    handle = Run.of(client.get_run(_ended(client)).twin)
    handle.twin.answer = found
    with pytest.raises(DecodeError, match="RecursionError"):
        handle.result()


def _ended(client: LatticeClient) -> str:
    workflow = client.create_workflow()
    workflow.add_task(echo, {"value": 1})
    run = workflow.run()
    run.result(timeout=WAIT_S)
    return str(run)


def test_a_run_that_is_given_to_a_task_arrives_as_its_id(client: LatticeClient) -> None:
    run = client.get_run(_ended(client))
    assert client.run_task(echo, {"value": run})["result"] == ("str", str(run))
    assert client.run_task(echo, {"value": {"run": [run]}})["result"] == ("dict", {"run": [str(run)]})
    assert repr(run) == f"Run('{run}')"
    assert type(pickle.loads(pickle.dumps(run.twin))) is str


def test_task_error_names_the_client_when_it_is_an_input(client: LatticeClient) -> None:
    for given in (client, client.aio):
        refusal = r": <\w+ of .*> cannot be pickled: a task that needs a client must create one$"
        with pytest.raises(TaskDefinitionError, match="^input 'value' of task 'echo'" + refusal):
            client.run_task(echo, {"value": given})
        with pytest.raises(TaskDefinitionError, match="^input 'value' of task 'echo', item 1, entry 'k'" + refusal):
            client.run_task(echo, {"value": [1, {"k": given}]})
        with pytest.raises(TaskDefinitionError, match="uses variable 'used' of an enclosing function" + refusal):
            client.run_task(using(given), {})


def using(used: Any) -> Any:
    return lambda: used


def test_a_result_that_cannot_be_pickled_is_named_with_the_part_at_fault(client: LatticeClient) -> None:
    def locked() -> Any:
        import threading

        return {"k": [1, threading.Lock()]}

    with pytest.raises(TaskFailedError) as caught:
        client.run_task(locked)
    message = "output 'result', entry 'k', item 1 (_thread.lock) cannot be pickled: cannot pickle '_thread.lock' object"
    advice = "return data instead, such as texts, numbers, lists or dicts"
    assert str(caught.value).partition(" failed ")[2] == f"(PAYLOAD): {message}; {advice}"
    assert caught.value.remote_traceback == ""


def test_code_of_a_value_that_fails_to_be_pickled_is_in_the_traceback(client: LatticeClient) -> None:
    class Own:
        def __reduce__(self) -> Any:
            raise LookupError("not this one")

    with pytest.raises(TaskFailedError, match="PAYLOAD") as caught:
        client.run_task(Own)
    found = caught.value.remote_traceback
    assert 'raise LookupError("not this one")' in found
    assert "cloudpickle" not in found


HALF = "half \ud83d"


@pytest.mark.parametrize(
    "ask",
    [
        lambda c: c.get_run(HALF),
        lambda c: c.list_tasks(HALF),
        lambda c: c.cancel_run("r", HALF),
        lambda c: c.explain("r", HALF),
        lambda c: c.drain_node(HALF),
        lambda c: list(Run.of(AsyncRun.of(HALF, c.twin.api)).events()),
        lambda c: _one_task(c, name=HALF).run(),
        lambda c: _one_task(c, task_name=HALF).run(),
        lambda c: _one_task(c).run(run_id=HALF),
        lambda c: _one_task(c).run(labels={HALF: "x"}),
        lambda c: _one_task(c).run(labels={"x": HALF}),
        lambda c: _one_task(c).run(labels={"x": 1}),
        lambda c: _one_task(c).run(priority="high"),
        lambda c: c.run_task(task(name=HALF)(lambda value: value), {"value": 1}),
    ],
)
def test_a_name_that_cannot_be_sent_is_an_error_of_this_package(client: LatticeClient, ask: Any) -> None:
    with pytest.raises((InvalidArgumentError, TaskDefinitionError)) as caught:
        ask(client)
    str(caught.value).encode(errors="backslashreplace")
    assert client.server_info().executor == "local"


def _one_task(client: LatticeClient, name: str = "", task_name: str | None = None) -> Any:
    workflow = client.create_workflow(name)
    workflow.add_task(echo, {"value": 1}, task_name)
    return workflow


class Refusing(test_calls.Server):
    """Ends an upload after its first part."""

    async def WriteArtifact(
        self, request_iterator: AsyncIterator[artifact_pb2.WriteArtifactRequest], context: grpc.aio.ServicerContext
    ) -> artifact_pb2.WriteArtifactResponse:
        """Take one part, and refuse."""
        self.calls["WriteArtifact"] += 1
        async for _ in request_iterator:
            break
        await test_calls.fail(context, code_pb2.RESOURCE_EXHAUSTED)


def test_upload_raises_unavailable_when_the_server_ends_it_early() -> None:
    async def scenario(client: AsyncLatticeClient, server: test_calls.Server) -> None:
        for _ in range(10):
            with pytest.raises((ResourceExhaustedError, UnavailableError)) as caught:
                await client.run_task(test_calls.size, {"data": LARGE})
            assert "Internal error from Core" not in str(caught.value)

    test_calls.play(scenario, Refusing())
