"""Owns the handles of runs for synchronous callers. Rule: each method runs the coroutine of the asyncio handle."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Never, Self

from lattice.v1 import run_pb2, task_pb2

from lattice_client.convert.events import RunEvent
from lattice_client.graph.deferred import UNSET
from lattice_client.graph.definition import TaskDefinition
from lattice_client.graph.nodes import LatticeTask
from lattice_client.graph.outputs import TaskOutput
from lattice_client.graph.settings import disconnect_grace_s
from lattice_client.runs import streams
from lattice_client.runs.decoding import decoded
from lattice_client.runs.driver import blocking, iterate
from lattice_client.runs.ids import RunId
from lattice_client.runs.open_run import AsyncOpenRun
from lattice_client.runs.questions import Question
from lattice_client.runs.run import AsyncRun


class Run(RunId):
    """A run: its id as a text, with methods that read and change the run."""

    twin: AsyncRun

    @classmethod
    def of(cls, twin: AsyncRun) -> Self:
        """Return the run of a handle over a `BlockingChannel`."""
        found = cls(twin)
        found.twin, found.declared = twin, twin.declared
        return found

    @property
    def ends_with_caller(self) -> bool:
        """Whether the server cancels the run when this process ends."""
        return self.twin.ends_with_caller

    def result(
        self,
        timeout: float | None = None,
        *,
        partial: bool = False,
        trust_pickles: bool = False,
        cancel_on_disconnect: bool | float = False,
    ) -> dict[str, Any]:
        """Wait for the end of the run and return the outputs of its final tasks, on which no other task depends.

        For a graph with one final task this is a dict of its outputs by name. For a graph with several it is a dict of
        such dicts by task id, in which a skipped task is None. With `partial` a failed or cancelled run does not raise:
        each task that did not succeed is None. With `cancel_on_disconnect` the run is cancelled when this call ends
        before it, by a timeout, an interrupt or the end of this process. See `AsyncRun.result`.

        Raises:
            TaskFailedError: a task failed; its cause is the original exception when it can be rebuilt.
            RunCancelledError: the run was cancelled.
            TimeoutError: `timeout` seconds passed; the run continues.
            UnavailableError: the server could not be reached for 30 s; the run may continue.
            UntrustedPayloadError: a value is a pickle of a sandboxed task; with `trust_pickles` it is unpickled.
            DecodeError: a value cannot be decoded here.
        """
        grace_s = disconnect_grace_s(cancel_on_disconnect)
        fetched = blocking(self.twin.fetched_result(timeout, partial, grace_s), self if grace_s is None else "")
        found: dict[str, Any] = decoded(fetched, trust_pickles)
        return found

    def output(
        self, task: LatticeTask | TaskOutput | str, timeout: float | None = None, *, trust_pickles: bool = False
    ) -> Any:
        """Wait for the end of a task and return its output, or its outputs by name; see `AsyncRun.output`.

        For an output, `task.output` or `task.outputs["name"]`, it returns the value of that output.

        Raises:
            TaskFailedError: the task failed; its cause is the original exception when it can be rebuilt.
            RunError: the task was skipped or cancelled.
            NotFoundError: the run has no such task.
            TimeoutError: `timeout` seconds passed; the run continues.
            UnavailableError: the server could not be reached for 30 s; the run may continue.
            UntrustedPayloadError: a value is a pickle of a sandboxed task; with `trust_pickles` it is unpickled.
            DecodeError: a value cannot be decoded here.
        """
        return decoded(blocking(self.twin.fetched_output(task, timeout), self), trust_pickles)

    def events(self, after: int = 0, timeout: float | None = None) -> Iterator[RunEvent]:
        """Yield the run's events after number `after`, to its end. Raises TimeoutError after `timeout` seconds."""
        for event in iterate(self.twin.api, self.twin.fetched_events(after), self, timeout):
            yield decoded(event)

    def stream(
        self, task: streams.Streaming, *, on_restart: streams.OnRestart | None = None, timeout: float | None = None
    ) -> Iterator[Any]:
        """Yield the values that a task streams, to its end; see `AsyncRun.stream`. Raises TimeoutError."""
        source = streams.values(self.twin.api, self, task, on_restart)
        for chunk in iterate(self.twin.api, source, self, timeout):
            yield streams.with_value(chunk).value

    def chunks(
        self,
        task: streams.Streaming | None = None,
        after: Mapping[str, int] | None = None,
        timeout: float | None = None,
    ) -> Iterator[streams.Chunk]:
        """Yield the kept chunks of one task, or of all tasks; see `AsyncRun.chunks`. Raises TimeoutError."""
        for chunk in iterate(self.twin.api, streams.chunks(self.twin.api, self, task, after), self, timeout):
            yield streams.with_value(chunk)

    def progress(
        self, task: streams.Streaming | None = None, timeout: float | None = None
    ) -> Iterator[streams.Progress]:
        """Yield how far one task is, or all tasks are; see `AsyncRun.progress`. Raises TimeoutError."""
        yield from iterate(self.twin.api, self.twin.progress(task), self, timeout)

    def cancel(self, reason: str = "") -> None:
        """Cancel the run."""
        blocking(self.twin.cancel(reason))

    def signal(self, name: str, value: Any = None) -> None:
        """Send a signal to the run: `context.wait_for(name)` returns the value in tasks of it. See `AsyncRun.signal`.

        Raises TaskDefinitionError, InvalidArgumentError, PreconditionError, ResourceExhaustedError.
        """
        blocking(self.twin.signal(name, value))

    def retry(self, new_run_id: str = "", *, secrets: Sequence[str] = ()) -> "Run":
        """Start a run that repeats the unfinished tasks of this one; see `AsyncRun.retry`."""
        return Run.of(blocking(self.twin.retry(new_run_id, secrets=secrets)))

    def cancel_task(self, task: LatticeTask | str) -> None:
        """Cancel one task; the failure policy decides about the tasks that depend on it."""
        blocking(self.twin.cancel_task(task))

    def add_tasks(self, tasks: Sequence[LatticeTask], expected_revision: int | None = None) -> int:
        """Add tasks of any workflow to the running run; return its new revision.

        They can be wired to each other and to every task of the run. Raises AbortedError when the run does not have the
        expected revision, PreconditionError when it has ended.
        """
        return blocking(self.twin.add_tasks(tasks, expected_revision))

    def explain(self, task: LatticeTask | str) -> task_pb2.ExplainTaskResponse:
        """Return why a task is queued or not ready: its state, the reasons, the time so far and an estimate."""
        return blocking(self.twin.explain(task))

    def status(self) -> str:
        """Return the run's state: running, cancelling, succeeded, failed or cancelled."""
        return blocking(self.twin.status())


class OpenRun(Run):
    """A run that accepts tasks while its stream is open, and whose tasks may ask the caller questions.

    Use it as a context manager. At the end of the block the run is closed, and the block waits for its end. A block
    that raises cancels the run. The error of a failed task is raised at the end, unless `output` raised it before.

    A thread that waits in a method of the run reads the stream and calls `on_question` meanwhile.
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
        """Add a task, which starts as soon as its inputs exist; see `LatticeWorkflow.add_task`.

        It can be wired to every task of the run, also to an ended one. Raises TaskDefinitionError, RequestError.
        """
        chosen = {"task_id": task_id, "when": when, "unless": unless, "equals": equals}
        return blocking(self.twin.add(task_func, inputs, task_name, **chosen, **misplaced))

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
        """Add a task that runs once for each item of a list that a task returns; see `LatticeWorkflow.map`."""
        return blocking(self.twin.map(task_func, over, inputs, task_name, task_id=task_id, **misplaced))

    def as_completed(self, tasks: Iterable[LatticeTask], timeout: float | None = None) -> Iterator[LatticeTask]:
        """Yield tasks of the run in the order in which they end, including failed ones. Raises TimeoutError."""
        yield from iterate(self.twin.api, self.twin.as_completed(tasks), self, timeout)

    def questions(self, timeout: float | None = None) -> Iterator[Question]:
        """Yield the questions of tasks until the end of a run that was opened without `on_question`.

        Raises TimeoutError after `timeout` seconds.
        """
        yield from iterate(self.twin.api, self.twin.questions(), self, timeout)

    def close(self, timeout: float | None = None) -> run_pb2.Run:
        """Close the run, which then accepts no more tasks, and wait for its end. Raises TimeoutError."""
        return blocking(self.twin.close(timeout))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None:
            blocking(self.twin.cancel_for(error))
            return
        self.close()
        decoded(blocking(self.twin.unreported_error()))
