"""Owns the handles of runs of the synchronous client. Rule: nothing is decided here, and no other thread takes part.

Each call runs the coroutine of the asyncio handle of the same name over calls that block, in the caller's own thread.
"""

import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any, Never, Self, TypeVar

from lattice.v1 import run_pb2, task_pb2

from lattice_client import errors
from lattice_client.client import AsyncLatticeClient
from lattice_client.convert.graphs import RunEvent
from lattice_client.graph.outputs import UNSET, TaskOutput
from lattice_client.graph.task import TaskDefinition
from lattice_client.graph.workflow import LatticeTask
from lattice_client.runs.decoding import opened
from lattice_client.runs.open_run import AsyncOpenRun
from lattice_client.runs.questions import Question
from lattice_client.runs.run import AsyncRun, RunId
from lattice_client.transport import forks

T = TypeVar("T")
_END = object()


def done(coroutine: Coroutine[Any, Any, T], run_id: str = "") -> T:
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


def iterate(twin: AsyncLatticeClient, source: AsyncIterator[T], run_id: str, timeout: float | None) -> Iterator[T]:
    iterator = aiter(source)
    ends_at = None if timeout is None else twin.now() + timeout

    async def step() -> Any:
        left_s = None if ends_at is None else ends_at - twin.now()
        async with twin.reader.limited(run_id, left_s, allowed_s=timeout):
            return await anext(iterator, _END)

    while (item := done(step(), run_id)) is not _END:
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
        found: dict[str, Any] = opened(done(self.twin.fetched_result(timeout, partial), self))
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
        return opened(done(self.twin.fetched_output(task, timeout), self))

    def events(self, after: int = 0, timeout: float | None = None) -> Iterator[RunEvent]:
        """Yield the run's events after number `after`, to its end. Raises TimeoutError after `timeout` seconds."""
        for event in iterate(self.twin.client, self.twin.fetched_events(after), self, timeout):
            yield opened(event)

    def cancel(self, reason: str = "") -> None:
        """Cancel the run."""
        done(self.twin.cancel(reason))

    def retry(self, new_run_id: str = "") -> "Run":
        """Start a run that takes over what this one finished; see `LatticeClient.retry_run`."""
        return Run.of(done(self.twin.retry(new_run_id)))

    def cancel_task(self, task: LatticeTask | str) -> None:
        """Cancel one task; what depends on it follows the workflow's failure policy."""
        done(self.twin.cancel_task(task))

    def add_tasks(self, tasks: Sequence[LatticeTask], expected_revision: int | None = None) -> int:
        """Add tasks, of any workflow, to the run while it goes on; return its revision after that.

        They may be wired to each other and to every task of the run. Raises AbortedError when the run does not have
        the expected revision, PreconditionError when it has ended.
        """
        return done(self.twin.add_tasks(tasks, expected_revision))

    def explain(self, task: LatticeTask | str) -> task_pb2.ExplainTaskResponse:
        """Return why a task waits: its state, the reasons, since when, and a guess at how much longer."""
        return done(self.twin.explain(task))

    def status(self) -> str:
        """Return the run's state: running, cancelling, succeeded, failed or cancelled."""
        return done(self.twin.status())


class OpenRun(Run):
    """A run that goes on while it is held open: tasks are added as it goes, and may ask the caller questions.

    Use it as a context manager. At the end of the block the run is closed and its end awaited; a block that raises
    cancels the run. A failed task that `output` was not asked for is raised at the end.

    What the server tells is read, and `on_question` is called, in the thread that waits for something, while it does.
    """

    twin: AsyncOpenRun

    def add(
        self,
        task_func: TaskDefinition[..., Any] | Callable[..., Any],
        inputs: Mapping[str, Any] | None = None,
        task_name: str | None = None,
        *,
        task_id: str | None = None,
        when: TaskOutput | None = None,
        unless: TaskOutput | None = None,
        equals: Any = UNSET,
        **misplaced: Never,
    ) -> LatticeTask:
        """Add a task, which starts as soon as its inputs are there; see `LatticeWorkflow.add_task`.

        It may be wired to every task of the run, also to one that has ended. Raises TaskDefinitionError, RequestError.
        """
        chosen = {"task_id": task_id, "when": when, "unless": unless, "equals": equals}
        return done(self.twin.add(task_func, inputs, task_name, **chosen, **misplaced))

    def map(
        self,
        task_func: TaskDefinition[..., Any] | Callable[..., Any],
        over: TaskOutput | Mapping[str, TaskOutput],
        inputs: Mapping[str, Any] | None = None,
        task_name: str | None = None,
        *,
        task_id: str | None = None,
        **misplaced: Never,
    ) -> LatticeTask:
        """Add a task for each item of a list that a task of the run is still to make; see `LatticeWorkflow.map`."""
        return done(self.twin.map(task_func, over, inputs, task_name, task_id=task_id, **misplaced))

    def as_completed(self, tasks: Iterable[LatticeTask], timeout: float | None = None) -> Iterator[LatticeTask]:
        """Yield tasks of the run as they end, however they end. Raises TimeoutError after `timeout` seconds."""
        yield from iterate(self.twin.client, self.twin.as_completed(tasks), self, timeout)

    def questions(self, timeout: float | None = None) -> Iterator[Question]:
        """Yield the questions of tasks until the run has ended, for a run that was opened without `on_question`.

        Raises TimeoutError after `timeout` seconds.
        """
        yield from iterate(self.twin.client, self.twin.questions(), self, timeout)

    def close(self, timeout: float | None = None) -> run_pb2.Run:
        """Close the run and wait for its end: no more tasks will come. Raises TimeoutError."""
        return done(self.twin.close(timeout))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None:
            done(self.twin.give_up(error))
            return
        self.close()
        opened(done(self.twin.unseen_error()))
