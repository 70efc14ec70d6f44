"""Owns the synchronous client. Rule: nothing is decided here, and no other thread takes part.

Each call runs the coroutine of the asyncio client of the same name over calls that block, in the caller's own thread.
"""

import functools
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Never, NoReturn, Self, TypeVar, Unpack

from lattice.v1 import cluster_pb2, run_pb2, task_pb2, workflow_pb2

from lattice_client import convert, errors, forks
from lattice_client.blocking import BlockingChannel
from lattice_client.channel import dial
from lattice_client.client import AsyncLatticeClient
from lattice_client.convert import RunEvent
from lattice_client.opening import opened
from lattice_client.outputs import TaskOutput
from lattice_client.run import AsyncRun, RunId
from lattice_client.security import SecurityOptions
from lattice_client.settings import RunSettings
from lattice_client.starting import ADMISSION_TIMEOUT_S
from lattice_client.suspending import AsyncChannel
from lattice_client.workflow import Graph, LatticeTask

T = TypeVar("T")
_END = object()


def _done(coroutine: Coroutine[Any, Any, T], run_id: str = "") -> T:
    """Return what a coroutine over a `BlockingChannel` returns. Raises ClientClosedError, ForkError.

    With a `run_id`, KeyboardInterrupt says that the run goes on.
    """
    try:
        forks.check_process()
        if sys.is_finalizing():
            # What gRPC needs may be gone by now.
            raise errors.ClientClosedError("the program is ending: no call can be made any more")
        coroutine.send(None)
    except StopIteration as done:
        found: T = done.value
        return found
    except KeyboardInterrupt as error:
        if run_id:
            error.add_note(f"run {str(run_id)!r} goes on; `lattice runs cancel {run_id}` would end it")
        raise error.with_traceback(None) from None
    finally:
        coroutine.close()
    raise AssertionError("a call that blocks never suspends")


def _iterate(twin: AsyncLatticeClient, source: AsyncIterator[T], run_id: str, timeout: float | None) -> Iterator[T]:
    iterator = aiter(source)
    ends_at = None if timeout is None else twin.now() + timeout

    async def step() -> Any:
        left_s = None if ends_at is None else ends_at - twin.now()
        async with twin.reader.limited(run_id, left_s, allowed_s=timeout):
            return await anext(iterator, _END)

    while (item := _done(step(), run_id)) is not _END:
        yield item


class Run(RunId):
    """A run: its id, as a string, that can also be followed."""

    twin: AsyncRun

    @classmethod
    def of(cls, twin: AsyncRun) -> Self:
        """Return the run of a handle over a `BlockingChannel`."""
        found = cls(twin)
        found.twin, found.declared = twin, twin.declared
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
        found: dict[str, Any] = opened(_done(self.twin.fetched_result(timeout, partial), self))
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
        return opened(_done(self.twin.fetched_output(task, timeout), self))

    def events(self, after: int = 0, timeout: float | None = None) -> Iterator[RunEvent]:
        """Yield the run's events after number `after`, to its end. Raises TimeoutError after `timeout` seconds."""
        for event in _iterate(self.twin.client, self.twin.fetched_events(after), self, timeout):
            yield opened(event)

    def cancel(self, reason: str = "") -> None:
        """Cancel the run."""
        _done(self.twin.cancel(reason))

    def retry(self, new_run_id: str = "") -> "Run":
        """Start a run that takes over what this one finished; see `LatticeClient.retry_run`."""
        return Run.of(_done(self.twin.retry(new_run_id)))

    def cancel_task(self, task: LatticeTask | str) -> None:
        """Cancel one task; what depends on it follows the workflow's failure policy."""
        _done(self.twin.cancel_task(task))

    def add_tasks(self, tasks: Sequence[LatticeTask], expected_revision: int | None = None) -> int:
        """Add tasks, of any workflow, to the run while it goes on; return its revision after that.

        They may be wired to each other and to every task of the run. Raises AbortedError when the run does not have
        the expected revision, PreconditionError when it has ended.
        """
        return _done(self.twin.add_tasks(tasks, expected_revision))

    def explain(self, task: LatticeTask | str) -> task_pb2.ExplainTaskResponse:
        """Return why a task waits: its state, the reasons, since when, and a guess at how much longer."""
        return _done(self.twin.explain(task))

    def status(self) -> str:
        """Return the run's state: running, cancelling, succeeded, failed or cancelled."""
        return _done(self.twin.status())


class LatticeWorkflow(Graph["LatticeClient"]):
    """A workflow being written. Nothing is sent before `run`."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name or self.workflow_id!r}, tasks: {len(self.tasks)}>"

    def run(self, run_id: str = "", **settings: Unpack[RunSettings]) -> Run:
        """Send the whole graph and start a run; the result is its id, and more (see `Run`).

        For the settings see `RunSettings`. Raises TaskDefinitionError, RequestError.
        """
        return Run.of(_done(self.client.twin.run(self, run_id, **settings)))

    def store(self, workflow_id: str = "") -> Self:
        """Store the workflow on the server, for `LatticeClient.get_workflow` and for other callers; return it.

        The id is chosen when none is given. The same id with the same content is stored once.

        Raises TaskDefinitionError, AlreadyExistsError when the id is taken by other content, RequestError.
        """
        return type(self)(self.client, workflow_id=_done(self.client.twin.store(self, workflow_id)))

    def get_results(self, run_id: str, verbose: bool = True, timeout: float | None = None) -> list[dict[str, Any]]:
        """Follow a run to its end and return its messages, printing them when `verbose`.

        Messages are `{"type": ..., "data": {...}}`, type one of `start_task`, `finish_task`, `task_exception` and,
        last, `finish_workflow`. Raises TimeoutError when the run takes longer than `timeout` seconds.
        """
        messages, twin = [], self.client.twin
        for event in _iterate(twin, twin.reader.fetched_events(run_id), run_id, timeout):
            message = convert.message_of(opened(event), self.workflow_id, run_id)
            if message is None:
                continue
            messages.append(message)
            if verbose:
                print(message)
        return messages


class LatticeClient:
    """A connection to a server; safe to use from any thread. `aio` is the asyncio client of the same server.

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
        self._dialled = dial(target, **security)
        self.target = self._dialled.address
        self._settings = tenant, admission_timeout
        # The asyncio client, over calls that block; `_done` runs its coroutines.
        self.twin = AsyncLatticeClient.over(BlockingChannel(self._dialled), *self._settings)

    @functools.cached_property
    def aio(self) -> AsyncLatticeClient:
        """The asyncio client of the same server, for any event loop."""
        return AsyncLatticeClient.over(AsyncChannel(self._dialled), *self._settings)

    def __repr__(self) -> str:
        return repr(self.twin).replace("Async", "", 1)

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} cannot be pickled: a task that needs a client makes one of its own")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; runs go on. Where the program is ending, or was forked, there is none to close."""
        with suppress(errors.ClientClosedError, errors.ForkError):
            _done(self.twin.close())
        if "aio" in self.__dict__:
            self.aio.shut()

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
        return Run.of(_done(self.twin.get_run(run_id)))

    def get_ray_head_port(self) -> int:
        """Return the port of the server's Ray head; zero without Ray."""
        return _done(self.twin.get_ray_head_port())

    def run_task(
        self,
        task: Any,
        inputs: Mapping[str, Any] | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        priority: int = 0,
        timeout: float | None = None,
        **misplaced: Never,
    ) -> dict[str, Any]:
        """Run one task as a run of its own and return its outputs; see `AsyncLatticeClient.run_task`.

        Raises TaskDefinitionError, TaskFailedError, RunTimeoutError, RequestError.
        """
        call = self.twin.run_task(task, inputs, labels=labels, priority=priority, timeout=timeout, **misplaced)
        return _done(call)

    def describe_run(self, run_id: str) -> run_pb2.Run:
        """Return a run as it is now. Raises NotFoundError."""
        return _done(self.twin.describe_run(run_id))

    def list_runs(
        self, limit: int = 100, *, states: Sequence[str] = (), labels: Mapping[str, str] | None = None
    ) -> list[run_pb2.Run]:
        """Return the newest runs: those in one of `states`, such as `"failed"`, that have all `labels`."""
        return _done(self.twin.list_runs(limit, states=states, labels=labels))

    def list_workflows(self) -> list[workflow_pb2.Workflow]:
        """Return the stored workflows, newest first, without their tasks."""
        return _done(self.twin.list_workflows())

    def delete_workflow(self, workflow_id: str) -> None:
        """Delete a stored workflow; its runs keep their copies. Raises NotFoundError."""
        _done(self.twin.delete_workflow(workflow_id))

    def list_tasks(self, run_id: str, with_outputs: bool = False) -> list[run_pb2.TaskRun]:
        """Return a run's tasks as they are now, in the order of their definition. Raises NotFoundError."""
        return _done(self.twin.list_tasks(run_id, with_outputs))

    def run_graph(self, run_id: str) -> list[workflow_pb2.GraphTask]:
        """As `AsyncLatticeClient.run_graph`."""
        return _done(self.twin.run_graph(run_id))

    def explain(self, run_id: str, task_id: str) -> task_pb2.ExplainTaskResponse:
        """Return why a task waits. Raises NotFoundError."""
        return _done(self.twin.explain(run_id, task_id))

    def cancel_run(self, run_id: str, reason: str = "") -> run_pb2.Run:
        """Cancel a run. Raises NotFoundError."""
        return _done(self.twin.cancel_run(run_id, reason))

    def retry_run(self, run_id: str, new_run_id: str = "") -> Run:
        """Start a run that takes over the finished tasks of one that has ended, and runs the others.

        It has the same workflow, parameters and settings.

        Raises NotFoundError, and PreconditionError when the run has not ended.
        """
        return Run.of(_done(self.twin.retry_run(run_id, new_run_id)))

    def nodes(self) -> list[cluster_pb2.Node]:
        """Return the nodes in the ledger."""
        return _done(self.twin.nodes())

    def drain_node(self, node_id: str, deadline: float | None = None) -> cluster_pb2.Node:
        """As `AsyncLatticeClient.drain_node`."""
        return _done(self.twin.drain_node(node_id, deadline))

    def server_info(self) -> cluster_pb2.GetServerInfoResponse:
        """Return the server's version, limits and load."""
        return _done(self.twin.server_info())
