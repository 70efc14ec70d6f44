"""Owns reading runs: their events, their ends and their results.

Rule: a broken stream of events is resumed after the last event received. Values are fetched here and not decoded; see
`decoding`.
"""

import math
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from lattice.v1 import results_pb2, run_pb2, task_pb2

from lattice_client import errors
from lattice_client.convert import failures, results
from lattice_client.convert.events import RunEvent, event_of
from lattice_client.convert.results import Declared, Decode
from lattice_client.graph.nodes import LatticeTask
from lattice_client.graph.outputs import TaskOutput
from lattice_client.runs.artifacts import Transfer
from lattice_client.runs.decoding import Part
from lattice_client.runs.executions import Execution
from lattice_client.runs.ids import RunId, task_id_of
from lattice_client.runs.paging import PAGE_SIZE, pages
from lattice_client.transport.channel import Channel
from lattice_client.transport.reconnection import MAX_BACKOFF_S, OnLoss, Reconnection, limited
from lattice_client.transport.requests import duration, made, whole_number

if TYPE_CHECKING:
    from grpc.aio import UnaryUnaryMultiCallable

Q = TypeVar("Q")
R = TypeVar("R")

# How long the server may hold one call that waits for an end; the call is then repeated.
WAIT_S = 60.0
TERMINAL = frozenset({run_pb2.RUN_STATE_SUCCEEDED, run_pb2.RUN_STATE_FAILED, run_pb2.RUN_STATE_CANCELLED})
ENDED = frozenset(
    {
        run_pb2.TASK_STATE_SUCCEEDED,
        run_pb2.TASK_STATE_FAILED,
        run_pb2.TASK_STATE_CANCELLED,
        run_pb2.TASK_STATE_SKIPPED,
    }
)


@dataclass(frozen=True, slots=True)
class Selection:
    """The events of a run that a reader wants.

    Attributes:
        task_ids: only events of the run and of these tasks; empty for all.
        has_logs: whether output of tasks is wanted.
        until: the number after whose event the reader stops; None for the end of the run.
    """

    task_ids: tuple[str, ...] = ()
    has_logs: bool = True
    until: int | None = None


ALL = Selection()


class Reader:
    """Reads the runs of one server. It returns fetched objects, which `decoded` decodes."""

    def __init__(self, rpc: Channel, transfer: Transfer) -> None:
        self._rpc = rpc
        self._transfer = transfer

    def limited(
        self, run_id: str, timeout: float | None, task_id: str = "", *, allowed_s: float | None = None
    ) -> AbstractAsyncContextManager[None]:
        """Limit the duration of a block; see `reconnection.limited`."""
        return limited(self._rpc, run_id, timeout, task_id, allowed_s)

    async def ended(
        self, run_id: str, execution: Execution | None = None, grace_s: float | None = None
    ) -> results_pb2.GetResultResponse:
        """Wait for a run's end; return the server's answer. Raises RequestError.

        `execution` started the run. With `grace_s` the run ends with this client, see `disconnect_grace_s`.
        """
        last = None if execution is None else await execution.ended()
        return await self._get_result(run_id, grace_s) if last is None else last.ended

    async def result_in(
        self,
        answer: results_pb2.GetResultResponse,
        is_partial: bool = False,
        declared: Declared = MappingProxyType({}),
    ) -> Any:
        """Return the fetched outputs of an ended run, or its error; see `AsyncRun.result`."""
        if answer.run.state != run_pb2.RUN_STATE_SUCCEEDED and not is_partial:
            return await self.error_of(answer.run)
        return await results.result_of(answer.final_tasks, self._transfer.fetch, declared)

    async def outcome_of(self, response: task_pb2.RunTaskResponse, task: LatticeTask) -> Any:
        """Wait for the end of a run of one task; return the fetched outputs of that task, or the error of the run.

        Tasks that it spawned belong to the run, and their outputs are read from the run.
        """
        tie = response.run.cancel_on_disconnect
        grace_s = tie.ToNanoseconds() / 1e9 if response.run.HasField("cancel_on_disconnect") else None
        found = response.task
        if response.run.state != run_pb2.RUN_STATE_SUCCEEDED:
            ended = await self.ended(response.run.run_id, grace_s=grace_s)
            if ended.run.state != run_pb2.RUN_STATE_SUCCEEDED:
                return await self.error_of(ended.run)
            if (final := next((one for one in ended.final_tasks if one.task_id == found.task_id), None)) is None:
                request = task_pb2.GetTaskRequest(run_id=response.run.run_id, task_id=found.task_id)
                final = (await self._rpc.call(self._rpc.tasks.GetTask, request)).task
            found = final
        outputs = results.ordered(found.outputs, task.definition.outputs)
        return await results.decode_all(found.task_id, outputs, self._transfer.fetch)

    async def error_of(self, run: run_pb2.Run) -> errors.RunError | None:
        """Return the error of an ended run, with the display name of the failed task; None when the run succeeded."""
        request, name = task_pb2.GetTaskRequest(run_id=run.run_id, task_id=run.failure.task_id), ""
        if request.task_id:
            with suppress(errors.LatticeError):
                name = (await self._rpc.call(self._rpc.tasks.GetTask, request)).task.display_name
        return failures.error_of(run, name)

    async def output_of(self, run_id: str, task: LatticeTask | TaskOutput | str) -> Any:
        """Wait for a task's end; return its fetched output, or its error; see `AsyncRun.output`."""
        task_id = task_id_of(task)
        request = made(task_pb2.GetTaskRequest, run_id=run_id, task_id=task_id, wait=duration(WAIT_S))
        found = await self._until(run_id, self._rpc.tasks.GetTask, request, lambda r: r.task.state in ENDED)
        return await self.output_in(found.task, run_id, task)

    async def find_task(self, run_id: str, task_id: str) -> None:
        """Raise NotFoundError when a run has no such task."""
        await self._rpc.call(self._rpc.tasks.GetTask, made(task_pb2.GetTaskRequest, run_id=run_id, task_id=task_id))

    async def output_in(self, ended: run_pb2.TaskRun, run_id: str, task: LatticeTask | TaskOutput | str) -> Any:
        """Return the fetched output of an ended task, or its error."""
        task_id = ended.task_id
        if (failed := failures.error_of_task(ended)) is not None:
            return failed
        items = await self.list_tasks(run_id, with_outputs=True) if ended.item_count else []
        items = [item for item in items if item.parent_task_id == task_id]
        owner = task.owner if isinstance(task, TaskOutput) else task
        known = results.declared_by([owner] if isinstance(owner, LatticeTask) else ())
        declared = known.get(task_id) or _declared(run_id).get(task_id, ())
        outputs = await results.outputs_of(ended, items, self._transfer.fetch, declared) or {}
        if isinstance(task, TaskOutput) and task.output not in outputs:
            text = f"task {task_id!r} of run {str(run_id)!r} has no output {task.output!r}"
            return errors.RunError(run_id, f"{text}; its outputs: {', '.join(map(repr, outputs)) or 'none'}")
        found = results.value_of(outputs, task)
        return Part(run_id, task, found) if isinstance(task, TaskOutput) and task.path else found

    async def list_tasks(self, run_id: str, with_outputs: bool = False) -> list[run_pb2.TaskRun]:
        """As `AsyncLatticeClient.list_tasks`."""
        view = run_pb2.VIEW_FULL if with_outputs else run_pb2.VIEW_BASIC
        request = made(task_pb2.ListTasksRequest, run_id=run_id, view=view, page_size=PAGE_SIZE)
        return [task async for page in pages(self._rpc, self._rpc.tasks.ListTasks, request) for task in page.tasks]

    async def fetched_events(
        self,
        run_id: str,
        after: int = 0,
        fetch: Decode | None = None,
        on_loss: OnLoss | None = None,
        selection: Selection = ALL,
    ) -> AsyncIterator[RunEvent]:
        """Yield the selected events of a run after number `after`, with outputs as `fetch` returns them.

        By default the outputs are fetched, and not decoded. `on_loss` is called when the stream breaks.
        """
        after = whole_number(after, "after")
        reconnection = Reconnection(self._rpc, run_id, on_loss)
        until = math.inf if selection.until is None else selection.until
        is_complete = after >= until
        filters: dict[str, Any] = {"task_ids": selection.task_ids, "exclude_logs": not selection.has_logs}
        while not is_complete:
            request = made(results_pb2.WatchRunRequest, run_id=run_id, after_sequence=after, **filters)
            try:
                async for response in self._rpc.stream(self._rpc.results.WatchRun, request):
                    reconnection.succeeded()
                    for message in response.events:
                        if message.sequence > until:
                            return
                        yield await event_of(message, fetch or self._transfer.fetch, _declared(run_id))
                    after, is_complete = response.sequence, response.complete
                    if after >= until:
                        return
            except errors.RequestError as error:
                if not is_complete:
                    await reconnection.wait(error)

    async def _get_result(self, run_id: str, grace_s: float | None) -> results_pb2.GetResultResponse:
        request = made(results_pb2.GetResultRequest, run_id=run_id, wait=duration(WAIT_S))
        backoff_s = MAX_BACKOFF_S
        if grace_s is not None:
            request.cancel_on_disconnect.CopyFrom(duration(grace_s))
            backoff_s = min(backoff_s, grace_s / 10)
        call = self._rpc.results.GetResult
        try:
            return await self._until(run_id, call, request, lambda r: r.run.state in TERMINAL, backoff_s)
        except errors.RequestError:
            raise
        except BaseException:
            if grace_s is not None:
                # The call may not have reached the server, which would not know that the run was tied to it.
                request.ClearField("wait")
                self._rpc.beside(partial(self._tie, request))
            raise

    async def _tie(self, request: results_pb2.GetResultRequest) -> None:
        with suppress(errors.RequestError, errors.ClientClosedError):
            await self._rpc.call(self._rpc.results.GetResult, request)

    async def _until(
        self,
        run_id: str,
        method: "UnaryUnaryMultiCallable[Q, R]",
        request: Q,
        is_over: Callable[[R], bool],
        max_backoff_s: float = MAX_BACKOFF_S,
    ) -> R:
        """Repeat a call that waits on the server until its response says that the wait is over. Raises RequestError."""
        reconnection = Reconnection(self._rpc, run_id, max_backoff_s=max_backoff_s)
        while True:
            try:
                response = await self._rpc.call(method, request)
            except errors.RequestError as error:
                await reconnection.wait(error)
                continue
            reconnection.succeeded()
            if is_over(response):
                return response


def _declared(run_id: str) -> Declared:
    return run_id.declared if isinstance(run_id, RunId) else {}
