"""Owns the handle of a run, for asyncio. Rule: it is the run's id, and knows nothing the server does not."""

import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from lattice.v1 import results_pb2, run_pb2, task_pb2, workflow_pb2

from lattice_client.convert.graphs import Declared, RunEvent, declared_by
from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.outputs import Scope, TaskOutput
from lattice_client.graph.workflow import Graph, LatticeTask
from lattice_client.runs.decoding import opened
from lattice_client.transport.channel import OpenCall

if TYPE_CHECKING:
    from lattice_client.client import AsyncLatticeClient

StartCall = OpenCall[workflow_pb2.ExecuteWorkflowResponse]


class RunId(str):
    """The id of a run. What is made of it besides, a copy or a pickle, is the id and no more.

    `declared` has the names of the outputs of its tasks in their order, as far as that is known here.
    """

    declared: Declared = MappingProxyType({})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        # A run holds on to a connection, which cannot travel into a task; its id can.
        return str, (str(self),)

    @property
    def run_id(self) -> str:
        """The run's id."""
        return str(self)


class AsyncRun(RunId):
    """A run: its id, as a string, that can also be followed."""

    client: "AsyncLatticeClient"
    _call: StartCall | None
    answer: results_pb2.GetResultResponse | None
    # The graph it was started with, where that was here; and what was added to it from others.
    graph: Callable[[], Graph[Any] | None]
    _added: "weakref.WeakSet[LatticeTask]"
    declared: dict[str, Sequence[str]]

    @classmethod
    def of(
        cls,
        run_id: str,
        client: "AsyncLatticeClient",
        call: StartCall | None = None,
    ) -> Self:
        """Return the run with this id. `call` started it and ends with it."""
        run = cls(run_id)
        run.client, run._call, run.answer = client, call, None
        run.graph, run._added, run.declared = _unknown, weakref.WeakSet(), {}
        if call is not None:
            # Nobody can ask for the result any more: the call that would bring it may end.
            weakref.finalize(run, call.abandon).atexit = False
        return run

    async def result(self, timeout: float | None = None, *, partial: bool = False) -> dict[str, Any]:
        """Wait for the end and return what the final tasks gave: those that no other task of the graph depends on.

        Of a single one the outputs by name, of several a dict of those by task id, in which a task that was skipped is
        None. Whether there are several does not depend on what ran. The outputs of a mapped task are lists, one value
        for each item.

        With `partial` a run that failed or was cancelled raises nothing: a task that did not succeed is None, and so is
        each item of a mapped task that did not.

        Raises:
            TaskFailedError: a task failed; its cause is the original exception when it can be rebuilt.
            RunTimeoutError: the run took longer than its own time limit.
            RunCancelledError: the run was cancelled.
            TimeoutError: `timeout` seconds passed; the run goes on.
            UnavailableError: the server could not be reached for `following.RECONNECT_S`; the run may go on.
            DecodeError: a value cannot be decoded here.
        """
        found: dict[str, Any] = opened(await self.fetched_result(timeout, partial))
        return found

    async def output(self, task: LatticeTask | TaskOutput | str, timeout: float | None = None) -> Any:
        """Wait for the end of any task of the run, given itself, its id or one of its outputs, and return what it gave.

        That is the value of a task with a single output, and otherwise a dict of the outputs by name; given an output,
        it is the value of that. Those of a mapped task are lists, one value for each item.

        Raises:
            TaskFailedError: the task failed; its cause is the original exception when it can be rebuilt.
            RunError: the task was skipped or cancelled.
            NotFoundError: the run has no such task.
            TimeoutError: `timeout` seconds passed; the run goes on.
            UnavailableError: the server could not be reached for `following.RECONNECT_S`; the run may go on.
            DecodeError: a value cannot be decoded here.
        """
        return opened(await self.fetched_output(task, timeout))

    async def fetched_result(self, timeout: float | None = None, partial: bool = False) -> Any:
        """Wait for the end and return what `opened` turns into the result, or into its error."""
        async with self.client.reader.limited(self, timeout):
            if self.answer is None:
                self.answer = await self.client.reader.ended(self, self._call)
            return await self.client.reader.result_in(self.answer, partial, self.declared)

    async def fetched_output(self, task: LatticeTask | TaskOutput | str, timeout: float | None = None) -> Any:
        """As `output`, for `opened`."""
        async with self.client.reader.limited(self, timeout, task_id_of(task)):
            return await self.client.reader.output_of(self, task)

    def events(self, after: int = 0) -> AsyncIterator[RunEvent]:
        """Yield the run's events after number `after`, to its end. Raises UnavailableError; see `following`."""
        return self.client.events(self, after)

    def fetched_events(self, after: int = 0) -> AsyncIterator[RunEvent]:
        """As `events`, for `opened`."""
        return self.client.reader.fetched_events(self, after)

    async def cancel(self, reason: str = "") -> None:
        """Cancel the run."""
        await self.client.cancel_run(self, reason)

    async def retry(self, new_run_id: str = "") -> "AsyncRun":
        """Start a run that takes over what this one finished; see `AsyncLatticeClient.retry_run`."""
        retried = await self.client.retry_run(self, new_run_id)
        retried.graph, retried._added, retried.declared = self.graph, self._added, self.declared
        return retried

    async def cancel_task(self, task: LatticeTask | str) -> None:
        """Cancel one task; what depends on it follows the workflow's failure policy."""
        await self.client.cancel_task(self, task_id_of(task))

    async def add_tasks(self, tasks: Sequence[LatticeTask], expected_revision: int | None = None) -> int:
        """Add tasks, of any workflow, to the run while it goes on; return its revision after that.

        They may be wired to each other and to every task of the run. Raises AbortedError when the run does not have
        the expected revision, PreconditionError when it has ended.
        """
        revision = await self.client.add_tasks(self, tasks, expected_revision)
        self.note_added(tasks)
        return revision

    def note_added(self, tasks: Sequence[LatticeTask]) -> None:
        """Note that the run has these tasks now."""
        self._added.update(tasks)
        self.declared |= declared_by(tasks)

    def note_graph(self, graph: Graph[Any]) -> None:
        """Note the graph it was started with."""
        self.graph, self.declared = weakref.ref(graph), declared_by(graph.tasks.values())

    def scope(self, tasks: Sequence[LatticeTask]) -> Scope:
        """Return what `tasks`, when they are added, may be wired to, as far as that is known here."""
        graph, added = self.graph(), {id(task) for task in tasks}

        def has(output: TaskOutput) -> bool:
            return graph is None or graph.has(output) or id(output.owner) in added or output.owner in self._added

        known = chain(tasks, self._added, graph.tasks.values() if graph else ())
        return Scope(has, {task.task_id for task in known}, graph.parameters if graph else {})

    async def explain(self, task: LatticeTask | str) -> task_pb2.ExplainTaskResponse:
        """Return why a task waits: its state, the reasons, since when, and a guess at how much longer."""
        return await self.client.explain(self, task_id_of(task))

    async def status(self) -> str:
        """Return the run's state: running, cancelling, succeeded, failed or cancelled."""
        run = await self.client.describe_run(self)
        return run_pb2.RunState.Name(run.state).removeprefix("RUN_STATE_").lower()


def _unknown() -> None:
    return None


def task_id_of(task: LatticeTask | TaskOutput | str) -> str:
    """Return the id of a task, given the task, its id or one of its outputs. Raises TaskDefinitionError for others."""
    if isinstance(task, str):
        return task
    if not isinstance(task, LatticeTask | TaskOutput):
        text = "a task of a run is named by itself, its id or one of its outputs, not by"
        raise TaskDefinitionError(f"{text} {task!r}")
    return task.task_id
