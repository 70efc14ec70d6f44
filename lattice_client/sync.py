"""Owns the synchronous client: the asyncio client, driven by one background thread for the whole process.

Rule: nothing is decided here; every call waits for its asyncio twin. Values are encoded and decoded in the caller's own
thread, since that runs code of their classes: the background thread serves every client of the process.
"""

import asyncio
import functools
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Never, NoReturn, Self, TypeVar, Unpack

import uvloop
from lattice.v1 import cluster_pb2, run_pb2, task_pb2

from lattice_client import convert, errors, forks
from lattice_client.client import AsyncLatticeClient
from lattice_client.convert import RunEvent
from lattice_client.following import timed_out
from lattice_client.inputs import Store
from lattice_client.opening import opened
from lattice_client.outputs import TaskOutput
from lattice_client.run import AsyncRun, RunId
from lattice_client.security import SecurityOptions
from lattice_client.settings import RunSettings
from lattice_client.starting import ADMISSION_TIMEOUT_S
from lattice_client.workflow import Graph, LatticeTask, single

if TYPE_CHECKING:
    from lattice.v1.payload_pb2 import Payload

T = TypeVar("T")
_END = object()


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = uvloop.new_event_loop()
    forks.use(loop)
    threading.Thread(target=loop.run_forever, name="lattice-client", daemon=True).start()
    return loop


# The thread that drives the loop stays behind in a fork.
os.register_at_fork(after_in_child=_loop.cache_clear)


def _wait(coroutine: Coroutine[Any, Any, T], run_id: str = "") -> T:
    """Return what a coroutine returns on the background loop. Raises ClientClosedError, ForkError.

    With a `run_id`, KeyboardInterrupt says that the run goes on.
    """
    try:
        forks.check_process()
        if sys.is_finalizing():
            # No other thread runs any more: nothing would ever answer.
            raise errors.ClientClosedError("the program is ending: no call can be made any more")
        future = asyncio.run_coroutine_threadsafe(coroutine, _loop())
    except BaseException:
        coroutine.close()
        raise
    try:
        return future.result()
    except KeyboardInterrupt as error:
        # The call must not go on behind the caller's back.
        future.cancel()
        if run_id:
            error.add_note(f"run {str(run_id)!r} goes on; `lattice runs cancel {run_id}` would end it")
        raise error.with_traceback(None) from None
    except BaseException:
        future.cancel()
        raise


def _here(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine returns that waits for nothing, in this thread."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        found: T = done.value
        return found
    coroutine.close()
    raise AssertionError("it waits for something")


def _iterate(source: AsyncIterator[T], run_id: str, timeout: float | None = None) -> Iterator[T]:
    iterator = aiter(source)
    deadline = None if timeout is None else time.monotonic() + timeout

    async def step() -> Any:
        left_s = None if deadline is None else deadline - time.monotonic()
        try:
            async with asyncio.timeout(left_s) as scope:
                return await anext(iterator, _END)
        except TimeoutError:
            if not scope.expired():
                raise
            raise timed_out(run_id, timeout) from None

    while (item := _wait(step(), run_id)) is not _END:
        yield item


class Run(RunId):
    """A run: its id, as a string, that can also be followed."""

    aio: AsyncRun

    @classmethod
    def of(cls, run: AsyncRun) -> Self:
        """Return the synchronous face of a run."""
        found = cls(run)
        found.aio, found.declared = run, run.declared
        return found

    def result(self, timeout: float | None = None, *, partial: bool = False) -> dict[str, Any]:
        """Wait for the end and return what the final tasks gave: those that no other task of the graph depends on.

        Of a single one the outputs by name, of several a dict of those by task id, in which a task that was skipped is
        None. With `partial` a run that failed or was cancelled raises nothing, and a task that did not succeed is None.

        Raises:
            TaskFailedError: a task failed; its cause is the original exception when it can be rebuilt.
            RunCancelledError: the run was cancelled.
            TimeoutError: `timeout` seconds passed; the run goes on.
            UnavailableError: the server could not be reached for `following.RECONNECT_S`; the run may go on.
            DecodeError: a value cannot be decoded here.
        """
        found: dict[str, Any] = opened(_wait(self.aio.fetched_result(timeout, partial), self))
        return found

    def output(self, task: LatticeTask | TaskOutput | str, timeout: float | None = None) -> Any:
        """Wait for the end of any task of the run and return its output, or its outputs by name; see `AsyncRun.output`.

        Given one output, as `task.output` or `task.outputs["name"]`, that is returned.

        Raises:
            TaskFailedError: the task failed; its cause is the original exception when it can be rebuilt.
            RunError: the task was skipped or cancelled.
            NotFoundError: the run has no such task.
            TimeoutError: `timeout` seconds passed; the run goes on.
            UnavailableError: the server could not be reached for `following.RECONNECT_S`; the run may go on.
            DecodeError: a value cannot be decoded here.
        """
        return opened(_wait(self.aio.fetched_output(task, timeout), self))

    def events(self, after: int = 0, timeout: float | None = None) -> Iterator[RunEvent]:
        """Yield the run's events after number `after`, to its end. Raises TimeoutError after `timeout` seconds."""
        for event in _iterate(self.aio.fetched_events(after), self, timeout):
            yield opened(event)

    def cancel(self, reason: str = "") -> None:
        """Cancel the run."""
        _wait(self.aio.cancel(reason))

    def cancel_task(self, task: LatticeTask | str) -> None:
        """Cancel one task; what depends on it follows the workflow's failure policy."""
        _wait(self.aio.cancel_task(task))

    def add_tasks(self, tasks: Sequence[LatticeTask], expected_revision: int | None = None) -> int:
        """Add tasks, of any workflow, to the run while it goes on; return its revision after that.

        They may be wired to each other and to every task of the run. Raises AbortedError when the run does not have
        the expected revision, PreconditionError when it has ended.
        """
        client = self.aio.client
        spec = _here(client.starter.spec_of(tasks, _storing(client), self.aio.scope(tasks)))
        revision = _wait(client.starter.submit_tasks(self, spec, tasks, expected_revision))
        self.aio.note_added(tasks)
        return revision

    def explain(self, task: LatticeTask | str) -> task_pb2.ExplainTaskResponse:
        """Return why a task waits: its state, the reasons, since when, and a guess at how much longer."""
        return _wait(self.aio.explain(task))

    def status(self) -> str:
        """Return the run's state: running, cancelling, succeeded, failed or cancelled."""
        return _wait(self.aio.status())


def _storing(client: AsyncLatticeClient) -> Store:
    """Return what uploads on the background loop while this thread waits."""

    async def store(media_type: str, data: bytes) -> "Payload":
        return _wait(client.transfer.store(media_type, data))

    return store


class LatticeWorkflow(Graph["LatticeClient"]):
    """A workflow being written. Nothing is sent before `run`."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name or self.workflow_id!r}, tasks: {len(self.tasks)}>"

    def run(self, run_id: str = "", **settings: Unpack[RunSettings]) -> Run:
        """Send the whole graph and start a run; the result is its id, and more (see `Run`).

        For the settings see `RunSettings`. Raises TaskDefinitionError, RequestError.
        """
        client = self.client.aio
        request = _here(client.starter.request_of(self, _storing(client), run_id, **settings))
        return Run.of(_wait(client.submit(request, self)))

    def get_results(self, run_id: str, verbose: bool = True, timeout: float | None = None) -> list[dict[str, Any]]:
        """Follow a run to its end and return its messages, printing them when `verbose`.

        Messages are `{"type": ..., "data": {...}}`, type one of `start_task`, `finish_task`, `task_exception` and,
        last, `finish_workflow`. Raises TimeoutError when the run takes longer than `timeout` seconds.
        """
        messages = []
        for event in _iterate(self.client.aio.reader.fetched_events(run_id), run_id, timeout):
            message = convert.message_of(opened(event), self.workflow_id, run_id)
            if message is None:
                continue
            messages.append(message)
            if verbose:
                print(message)
        return messages


class LatticeClient:
    """A connection to a server; safe to use from any thread. `aio` is its asyncio twin, for any event loop.

    `tenant` names the caller that fair share counts; `admission_timeout` is for how many seconds a run that finds the
    server full is offered again before `ResourceExhaustedError` is raised. The rest makes the connection safe; see
    `SecurityOptions`. Connects with the first call. Raises TargetError when the target is no address, SecurityError
    when the connection would not be safe.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        tenant: str = "",
        admission_timeout: float = ADMISSION_TIMEOUT_S,
        **security: Unpack[SecurityOptions],
    ) -> None:
        self.aio = AsyncLatticeClient(target, tenant=tenant, admission_timeout=admission_timeout, **security)

    def __repr__(self) -> str:
        return repr(self.aio).replace("Async", "", 1)

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} cannot be pickled: a task that needs a client makes one of its own")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; runs go on. Where the program is ending, or was forked, there is none to close."""
        with suppress(errors.ClientClosedError, errors.ForkError):
            _wait(self.aio.close())

    def create_workflow(self, name: str = "", failure_policy: str = "fail_fast") -> LatticeWorkflow:
        """Return an empty workflow; nothing is sent.

        When a task fails, `fail_fast` stops the run, `finish_independent` still runs what does not depend on it.
        """
        return LatticeWorkflow(self, name, failure_policy=failure_policy)

    def get_workflow(self, workflow_id: str) -> LatticeWorkflow:
        """Return a workflow stored on the server, to be run by its id."""
        return LatticeWorkflow(self, workflow_id=workflow_id)

    def get_run(self, run_id: str) -> Run:
        """Return a run to follow. Raises NotFoundError."""
        return Run.of(_wait(self.aio.get_run(run_id)))

    def get_ray_head_port(self) -> int:
        """Return the port of the server's Ray head; zero without Ray."""
        return _wait(self.aio.get_ray_head_port())

    def run_task(self, task: Any, inputs: Mapping[str, Any] | None = None, **misplaced: Never) -> dict[str, Any]:
        """Run one task and return its outputs. Raises TaskDefinitionError, TaskFailedError, RequestError."""
        added = single(task, inputs, misplaced)
        request = _here(self.aio.starter.task_request_of(added, _storing(self.aio)))
        found: dict[str, Any] = opened(_wait(self.aio.submit_task(request, added)))
        return found

    def describe_run(self, run_id: str) -> run_pb2.Run:
        """Return a run as it is now. Raises NotFoundError."""
        return _wait(self.aio.describe_run(run_id))

    def list_runs(self, limit: int = 100) -> list[run_pb2.Run]:
        """Return the newest runs."""
        return _wait(self.aio.list_runs(limit))

    def list_tasks(self, run_id: str, with_outputs: bool = False) -> list[run_pb2.TaskRun]:
        """Return a run's tasks as they are now, in the order of their definition. Raises NotFoundError."""
        return _wait(self.aio.list_tasks(run_id, with_outputs))

    def explain(self, run_id: str, task_id: str) -> task_pb2.ExplainTaskResponse:
        """Return why a task waits. Raises NotFoundError."""
        return _wait(self.aio.explain(run_id, task_id))

    def cancel_run(self, run_id: str, reason: str = "") -> run_pb2.Run:
        """Cancel a run. Raises NotFoundError."""
        return _wait(self.aio.cancel_run(run_id, reason))

    def nodes(self) -> list[cluster_pb2.Node]:
        """Return the nodes in the ledger."""
        return _wait(self.aio.nodes())

    def drain_node(self, node_id: str, deadline: float | None = None) -> cluster_pb2.Node:
        """As `AsyncLatticeClient.drain_node`."""
        return _wait(self.aio.drain_node(node_id, deadline))

    def server_info(self) -> cluster_pb2.GetServerInfoResponse:
        """Return the server's version, limits and load."""
        return _wait(self.aio.server_info())
