"""Owns the synchronous client: the asyncio client, driven by one background thread for the whole process.

Rule: nothing is decided here; every call waits for its asyncio twin.
"""

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from typing import Any, Self, TypeVar, Unpack

import uvloop
from lattice.v1 import run_pb2, task_pb2, worker_pb2

from lattice_client.client import ADMISSION_TIMEOUT_S, AsyncLatticeClient, AsyncLatticeWorkflow
from lattice_client.convert import RunEvent
from lattice_client.run import AsyncRun
from lattice_client.security import SecurityOptions
from lattice_client.workflow import Graph, LatticeTask

T = TypeVar("T")
_END = object()


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = uvloop.new_event_loop()
    threading.Thread(target=loop.run_forever, name="lattice-client", daemon=True).start()
    return loop


def _wait(coroutine: Coroutine[Any, Any, T]) -> T:
    future = asyncio.run_coroutine_threadsafe(coroutine, _loop())
    try:
        return future.result()
    except BaseException:
        # Ctrl-C while waiting: the call must not go on behind the caller's back.
        future.cancel()
        raise


def _iterate(source: AsyncIterator[T], timeout: float | None = None) -> Iterator[T]:
    iterator = aiter(source)
    deadline = None if timeout is None else _loop().time() + timeout

    async def step() -> Any:
        async with asyncio.timeout_at(deadline):
            return await anext(iterator, _END)

    while (item := _wait(step())) is not _END:
        yield item


class Run(str):
    """A run: its id, as a string, that can also be followed."""

    aio: AsyncRun

    @classmethod
    def of(cls, run: AsyncRun) -> Self:
        """Return the synchronous face of a run."""
        found = cls(run)
        found.aio = run
        return found

    @property
    def run_id(self) -> str:
        """The run's id."""
        return str(self)

    def result(self, timeout: float | None = None, *, partial: bool = False) -> dict[str, Any]:
        """Wait for the end and return what the final tasks gave: those that no other task of the graph depends on.

        Of a single one the outputs by name, of several a dict of those by task id, in which a task that was skipped is
        None. With `partial` a run that failed or was cancelled raises nothing, and a task that did not succeed is None.

        Raises:
            TaskFailedError: a task failed; its cause is the original exception when it can be rebuilt.
            RunCancelledError: the run was cancelled.
            TimeoutError: `timeout` seconds passed; the run goes on.
        """
        return _wait(self.aio.result(timeout, partial=partial))

    def output(self, task: LatticeTask | str, timeout: float | None = None) -> Any:
        """Wait for the end of any task of the run and return its output, or its outputs by name; see `AsyncRun.output`.

        Raises:
            TaskFailedError: the task failed; its cause is the original exception when it can be rebuilt.
            RunError: the task was skipped or cancelled.
            NotFoundError: the run has no such task.
            TimeoutError: `timeout` seconds passed; the run goes on.
        """
        return _wait(self.aio.output(task, timeout))

    def events(self, after: int = 0, timeout: float | None = None) -> Iterator[RunEvent]:
        """Yield the run's events after number `after`, to its end. Raises TimeoutError after `timeout` seconds."""
        return _iterate(self.aio.events(after), timeout)

    def cancel(self, reason: str = "") -> None:
        """Cancel the run."""
        _wait(self.aio.cancel(reason))

    def cancel_task(self, task: LatticeTask | str) -> None:
        """Cancel one task; what depends on it follows the workflow's failure policy."""
        _wait(self.aio.cancel_task(task))

    def add_tasks(self, tasks: Sequence[LatticeTask], expected_revision: int = 0) -> int:
        """Add tasks, of any workflow, to the run while it goes on; return its revision after that.

        They may be wired to each other and to every task of the run. Raises AbortedError when the run does not have
        the expected revision, PreconditionError when it has ended.
        """
        return _wait(self.aio.add_tasks(tasks, expected_revision))

    def explain(self, task: LatticeTask | str) -> task_pb2.ExplainTaskResponse:
        """Return why a task waits: its state, the reasons, since when, and a guess at how much longer."""
        return _wait(self.aio.explain(task))

    def status(self) -> str:
        """Return the run's state: running, cancelling, succeeded, failed or cancelled."""
        return _wait(self.aio.status())


class LatticeWorkflow(Graph["LatticeClient"]):
    """A workflow being written. Nothing is sent before `run`."""

    def run(self, run_id: str = "", **settings: Any) -> Run:
        """Send the whole graph and start a run; the result is its id, and more (see `Run`). Raises RequestError."""
        return Run.of(_wait(self.client.aio.run(self, run_id, **settings)))

    def get_results(self, run_id: str, verbose: bool = True, timeout: float | None = None) -> list[dict[str, Any]]:
        """Follow a run to its end and return its messages, printing them when `verbose`.

        Messages are `{"type": ..., "data": {...}}`, type one of `start_task`, `finish_task`, `task_exception` and,
        last, `finish_workflow`. Raises TimeoutError when the run takes longer than `timeout` seconds.
        """
        twin = AsyncLatticeWorkflow(self.client.aio, workflow_id=self.workflow_id)
        messages = []
        for message in _iterate(twin.messages(run_id), timeout):
            messages.append(message)
            # Here and not by the twin: the background loop serves every client and must not wait for a terminal.
            if verbose:
                print(message)
        return messages


class LatticeClient:
    """A connection to a server; safe to use from any thread. `aio` is its asyncio twin, on the background loop.

    `tenant` names the caller that fair share counts; `admission_timeout` is for how many seconds a run that finds the
    server full is offered again before `ResourceExhaustedError` is raised. The rest makes the connection safe; see
    `SecurityOptions`. Raises SecurityError when it would not be.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        tenant: str = "",
        admission_timeout: float = ADMISSION_TIMEOUT_S,
        **security: Unpack[SecurityOptions],
    ) -> None:
        async def connect() -> AsyncLatticeClient:
            return AsyncLatticeClient(target, tenant=tenant, admission_timeout=admission_timeout, **security)

        self.aio = _wait(connect())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; runs go on."""
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

    def run_task(self, task: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Run one task and return its outputs. Raises TaskFailedError, RequestError."""
        return _wait(self.aio.run_task(task, inputs))

    def describe_run(self, run_id: str) -> run_pb2.Run:
        """Return a run as it is now. Raises NotFoundError."""
        return _wait(self.aio.describe_run(run_id))

    def list_runs(self, limit: int = 100) -> list[run_pb2.Run]:
        """Return the newest runs."""
        return _wait(self.aio.list_runs(limit))

    def list_tasks(self, run_id: str) -> list[run_pb2.TaskRun]:
        """Return a run's tasks as they are now, in the order of their definition. Raises NotFoundError."""
        return _wait(self.aio.list_tasks(run_id))

    def explain(self, run_id: str, task_id: str) -> task_pb2.ExplainTaskResponse:
        """Return why a task waits. Raises NotFoundError."""
        return _wait(self.aio.explain(run_id, task_id))

    def cancel_run(self, run_id: str, reason: str = "") -> run_pb2.Run:
        """Cancel a run. Raises NotFoundError."""
        return _wait(self.aio.cancel_run(run_id, reason))

    def nodes(self) -> list[worker_pb2.Node]:
        """Return the nodes in the ledger."""
        return _wait(self.aio.nodes())

    def drain_node(self, node_id: str, deadline: float | None = None) -> worker_pb2.Node:
        """As `AsyncLatticeClient.drain_node`."""
        return _wait(self.aio.drain_node(node_id, deadline))

    def cluster(self) -> worker_pb2.GetClusterResponse:
        """Return facts about the server and its cluster."""
        return _wait(self.aio.cluster())
