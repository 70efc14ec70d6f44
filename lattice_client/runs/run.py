"""Owns the handle of a run for asyncio. Rule: the server has the state of the run; the handle has its id."""

import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Self

from lattice.v1 import results_pb2, run_pb2, task_pb2

from lattice_client.convert.events import RunEvent
from lattice_client.convert.results import declared_by
from lattice_client.graph.nodes import LatticeTask, tasks_in
from lattice_client.graph.outputs import Scope, TaskOutput
from lattice_client.graph.settings import disconnect_grace_s
from lattice_client.graph.workflow import Graph
from lattice_client.runs import streams
from lattice_client.runs.api import RunApi
from lattice_client.runs.decoding import decoded
from lattice_client.runs.executions import Execution
from lattice_client.runs.ids import RunId, task_id_of
from lattice_client.runs.tracebacks import interruptible, shorten


@shorten
class AsyncRun(RunId):
    """A run: its id as a text, with methods that read and change the run."""

    api: RunApi
    _execution: Execution | None
    # After how many seconds without this client the run is cancelled, if it was started so.
    grace_s: float | None
    answer: results_pb2.GetResultResponse | None
    # A weak reference to the graph that started the run, if this client did; and the tasks added later.
    graph: Callable[[], Graph[Any] | None]
    _added: "weakref.WeakSet[LatticeTask]"
    declared: dict[str, Sequence[str]]

    @classmethod
    def of(cls, run_id: str, api: RunApi, execution: Execution | None = None) -> Self:
        """Return the run with an id. `execution` started it, and brings its result."""
        run = cls(run_id)
        run.api, run._execution, run.answer, run.grace_s = api, execution, None, None
        run.graph, run._added, run.declared = _unknown, weakref.WeakSet(), {}
        if execution is not None:
            # Without the run its result cannot be asked for.
            weakref.finalize(run, execution.abandon).atexit = False
        return run

    @property
    def ends_with_caller(self) -> bool:
        """Whether the server cancels the run when this process ends."""
        return self.grace_s is not None

    async def result(
        self,
        timeout: float | None = None,
        *,
        partial: bool = False,
        trust_pickles: bool = False,
        cancel_on_disconnect: bool | float = False,
    ) -> dict[str, Any]:
        """Wait for the end of the run and return the outputs of its final tasks, on which no other task depends.

        For a graph with one final task this is a dict of its outputs by name. For a graph with several it is a dict of
        such dicts by task id, in which a skipped task is None. The outputs of a mapped task are lists with one value
        for each item.

        With `partial` a failed or cancelled run does not raise: each task, and each item of a mapped task, that did not
        succeed is None.

        With `cancel_on_disconnect` the run is cancelled when this call ends before it: by a timeout, by cancellation,
        or because this client is disconnected for a second, or the given number of seconds.

        Raises:
            TaskFailedError: a task failed; its cause is the original exception when it can be rebuilt.
            RunTimeoutError: the run exceeded its time limit.
            RunCancelledError: the run was cancelled.
            TimeoutError: `timeout` seconds passed; the run continues.
            UnavailableError: the server could not be reached for 30 s; the run may continue.
            UntrustedPayloadError: a value is a pickle of a sandboxed task; with `trust_pickles` it is unpickled.
            DecodeError: a value cannot be decoded here.
        """
        grace_s = disconnect_grace_s(cancel_on_disconnect)
        with interruptible(self, is_tied=self.ends_with_caller or grace_s is not None):
            found: dict[str, Any] = decoded(await self.fetched_result(timeout, partial, grace_s), trust_pickles)
        return found

    async def output(
        self, task: LatticeTask | TaskOutput | str, timeout: float | None = None, *, trust_pickles: bool = False
    ) -> Any:
        """Wait for the end of a task, given by itself, its id or one of its outputs, and return its output.

        For a task with a single output this is its value, and otherwise a dict of its outputs by name. For an output it
        is the value of that output. The outputs of a mapped task are lists with one value for each item.

        Raises:
            TaskFailedError: the task failed; its cause is the original exception when it can be rebuilt.
            RunError: the task was skipped or cancelled.
            NotFoundError: the run has no such task.
            TimeoutError: `timeout` seconds passed; the run continues.
            UnavailableError: the server could not be reached for 30 s; the run may continue.
            UntrustedPayloadError: a value is a pickle of a sandboxed task; with `trust_pickles` it is unpickled.
            DecodeError: a value cannot be decoded here.
        """
        with interruptible(self, is_tied=self.ends_with_caller):
            return decoded(await self.fetched_output(task, timeout), trust_pickles)

    async def fetched_result(
        self, timeout: float | None = None, partial: bool = False, grace_s: float | None = None
    ) -> Any:
        """Wait for the end; return the fetched result, or the error, for `decoded`."""
        async with self.api.reader.limited(self, timeout):
            if self.answer is None:
                # The stream that started the run does not tie it to this wait.
                execution = self._execution if grace_s is None else None
                self.answer = await self.api.reader.ended(self, execution, grace_s or self.grace_s)
            return await self.api.reader.result_in(self.answer, partial, self.declared)

    async def fetched_output(self, task: LatticeTask | TaskOutput | str, timeout: float | None = None) -> Any:
        """Wait for the end of a task; return its fetched output, or its error, for `decoded`."""
        async with self.api.reader.limited(self, timeout, task_id_of(task)):
            return await self.api.reader.output_of(self, task)

    async def events(self, after: int = 0) -> AsyncIterator[RunEvent]:
        """Yield the run's events after number `after`, to its end. Raises UnavailableError as `result`."""
        with interruptible(self, is_tied=self.ends_with_caller):
            async for event in self.fetched_events(after):
                yield decoded(event)

    def fetched_events(self, after: int = 0) -> AsyncIterator[RunEvent]:
        """Yield the run's events, each for `decoded`."""
        return self.api.reader.fetched_events(self, after)

    async def stream(
        self, task: streams.Streaming, *, on_restart: streams.OnRestart | None = None
    ) -> AsyncIterator[Any]:
        """Yield the values that a task streams, from the first one on, to its end.

        Args:
            task: the task, or its id.
            on_restart: called with the number of an attempt that begins anew, so that the values yielded so far count
                no more. Without it such an attempt raises.

        Raises:
            StreamInterruptedError: values are not kept any more, or an attempt begins anew; see `chunks`.
            TaskFailedError: the task failed.
            UnavailableError: as `result`.
        """
        with interruptible(self, is_tied=self.ends_with_caller):
            async for chunk in streams.values(self.api, self, task, on_restart):
                yield streams.with_value(chunk).value

    async def chunks(
        self, task: streams.Streaming | None = None, after: Mapping[str, int] | None = None
    ) -> AsyncIterator[streams.Chunk]:
        """Yield the kept chunks of one task, or of all tasks, to its end or the end of the run.

        `after` has the numbers of the last chunks that the caller has, by task id. Raises UnavailableError as `result`.
        """
        with interruptible(self, is_tied=self.ends_with_caller):
            async for chunk in streams.chunks(self.api, self, task, after):
                yield streams.with_value(chunk)

    def progress(self, task: streams.Streaming | None = None) -> AsyncIterator[streams.Progress]:
        """Yield how far one task is, or all tasks are, to its end or the end of the run; newest values only."""
        return streams.progress(self.api, self, task)

    async def cancel(self, reason: str = "") -> None:
        """Cancel the run."""
        await self.api.calls.cancel_run(self, reason)

    async def signal(self, name: str, value: Any = None) -> None:
        """Send a signal to the run: `context.wait_for(name)` returns the value in tasks of it. It is kept until then.

        Raises:
            TaskDefinitionError: the value cannot be pickled, or is larger than the server's limit.
            InvalidArgumentError: the name is empty or too long.
            PreconditionError: the run has ended.
            ResourceExhaustedError: the run has got as many signals as it may.
        """
        await self.api.calls.signal_run(self, name, value)

    async def retry(self, new_run_id: str = "", *, secrets: Sequence[str] = ()) -> "AsyncRun":
        """Start a run that repeats the unfinished tasks of this one; see `AsyncLatticeClient.retry_run`.

        Also the secrets of tasks that this process has defined are sent again.
        """
        given = self.api.starter.secrets_again(self.graph(), self._added, secrets)
        retried = AsyncRun.of(await self.api.calls.retry_run(self, new_run_id, given), self.api)
        retried.graph, retried._added, retried.declared = self.graph, self._added, self.declared
        return retried

    async def cancel_task(self, task: LatticeTask | str) -> None:
        """Cancel one task; the failure policy decides about the tasks that depend on it."""
        await self.api.calls.cancel_task(self, task_id_of(task))

    async def add_tasks(self, tasks: Sequence[LatticeTask], expected_revision: int | None = None) -> int:
        """Add tasks of any workflow to the running run; return its new revision.

        They can be wired to each other and to every task of the run. Raises AbortedError when the run does not have the
        expected revision, PreconditionError when it has ended.
        """
        tasks = tasks_in(tasks)
        revision = await self.api.starter.add_tasks(self, tasks, self.scope(tasks), expected_revision)
        self.note_added(tasks)
        return revision

    def note_added(self, tasks: Sequence[LatticeTask]) -> None:
        """Record that tasks were added to the run."""
        self._added.update(tasks)
        self.declared |= declared_by(tasks)

    def note_graph(self, graph: Graph[Any]) -> None:
        """Record the graph that the run was started with."""
        self.graph, self.declared = weakref.ref(graph), declared_by(graph.tasks.values())

    def scope(self, tasks: Sequence[LatticeTask]) -> Scope:
        """Return the outputs and parameters that added `tasks` can be wired to, as far as this client knows them."""
        graph, added = self.graph(), {id(task) for task in tasks}

        def has(output: TaskOutput) -> bool:
            return graph is None or graph.has(output) or id(output.owner) in added or output.owner in self._added

        known = chain(tasks, self._added, graph.tasks.values() if graph else ())
        return Scope(has, {task.task_id for task in known}, graph.parameters if graph else {})

    async def explain(self, task: LatticeTask | str) -> task_pb2.ExplainTaskResponse:
        """Return why a task is queued or not ready: its state, the reasons, the time so far and an estimate."""
        return await self.api.calls.explain(self, task_id_of(task))

    async def status(self) -> str:
        """Return the run's state: running, cancelling, succeeded, failed or cancelled."""
        run = await self.api.calls.describe_run(self)
        return run_pb2.RunState.Name(run.state).removeprefix("RUN_STATE_").lower()


def _unknown() -> None:
    return None
