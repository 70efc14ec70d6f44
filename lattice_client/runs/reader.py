"""Owns how runs are followed: their events, their ends and their results.

Rule: a watch that breaks goes on after the last event it saw; see `following`. Values are fetched here, and decoded by
the methods that callers use, in their own thread; see `opening`.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from lattice.v1 import results_pb2, run_pb2, task_pb2

from lattice_client import errors
from lattice_client.convert import graphs
from lattice_client.convert.graphs import RunEvent
from lattice_client.graph.outputs import TaskOutput
from lattice_client.graph.workflow import LatticeTask
from lattice_client.runs.decoding import Part
from lattice_client.runs.run import RunId, StartCall, task_id_of
from lattice_client.transport.artifacts import Transfer
from lattice_client.transport.channel import Channel
from lattice_client.transport.reconnection import OnLoss, Reconnection, limited
from lattice_client.transport.requests import duration, made

if TYPE_CHECKING:
    from grpc.aio import UnaryUnaryMultiCallable

Q = TypeVar("Q")
R = TypeVar("R")

WAIT_S = 60.0
# More than servers return; each returns as many as it may.
PAGE_SIZE = 10_000
TERMINAL = frozenset({run_pb2.RUN_STATE_SUCCEEDED, run_pb2.RUN_STATE_FAILED, run_pb2.RUN_STATE_CANCELLED})
ENDED = frozenset(
    {
        run_pb2.TASK_STATE_SUCCEEDED,
        run_pb2.TASK_STATE_FAILED,
        run_pb2.TASK_STATE_CANCELLED,
        run_pb2.TASK_STATE_SKIPPED,
    }
)


class Reader:
    """Follows runs. What it returns is for `opened`."""

    def __init__(self, rpc: Channel, transfer: Transfer) -> None:
        self._rpc = rpc
        self._transfer = transfer

    def limited(
        self, run_id: str, timeout: float | None, task_id: str = "", *, allowed_s: float | None = None
    ) -> AbstractAsyncContextManager[None]:
        """As `following.limited`."""
        return limited(self._rpc, run_id, timeout, task_id, allowed_s)

    async def ended(self, run_id: str, call: StartCall | None = None) -> results_pb2.GetResultResponse:
        """Wait for a run's end; return the server's answer to it. Raises RequestError."""
        last = None if call is None else await call.last()
        return await self._get_result(run_id) if last is None else last.ended

    async def result_in(
        self,
        answer: results_pb2.GetResultResponse,
        is_partial: bool = False,
        declared: graphs.Declared = MappingProxyType({}),
    ) -> Any:
        """Return what `opened` turns into the outputs of a run that ended, or into its error; see `AsyncRun.result`."""
        if answer.run.state != run_pb2.RUN_STATE_SUCCEEDED and not is_partial:
            return await self.error_of(answer.run)
        return await graphs.result_of(answer.final_tasks, self._transfer.fetch, declared)

    async def outcome_of(self, response: task_pb2.RunTaskResponse, task: LatticeTask) -> Any:
        """Return the outputs of a task that runs alone, or its error. Waits for its end."""
        if response.run.state == run_pb2.RUN_STATE_SUCCEEDED:
            outputs = graphs.ordered(response.task.outputs, task.definition.outputs)
            return {name: await self._transfer.fetch(payload) for name, payload in outputs.items()}
        return await self.result_in(await self.ended(response.run.run_id), declared=graphs.declared_by([task]))

    async def error_of(self, run: run_pb2.Run) -> errors.RunError | None:
        """Return the error of a run that ended otherwise than well, with the name of the task that failed if it can be
        had; None of one that ended well."""
        request, name = task_pb2.GetTaskRequest(run_id=run.run_id, task_id=run.failure.task_id), ""
        if request.task_id:
            with suppress(errors.LatticeError):
                name = (await self._rpc.call(self._rpc.tasks.GetTask, request)).task.display_name
        return graphs.error_of(run, name)

    async def output_of(self, run_id: str, task: LatticeTask | TaskOutput | str) -> Any:
        """Wait for a task's end; return what `opened` turns into its output, or its error; see `AsyncRun.output`."""
        task_id = task_id_of(task)
        request = made(task_pb2.GetTaskRequest, run_id=run_id, task_id=task_id, wait=duration(WAIT_S))
        found = await self._until(run_id, self._rpc.tasks.GetTask, request, lambda r: r.task.state in ENDED)
        return await self.output_in(found.task, run_id, task)

    async def find_task(self, run_id: str, task_id: str) -> None:
        """Raise NotFoundError when a run has no such task."""
        await self._rpc.call(self._rpc.tasks.GetTask, made(task_pb2.GetTaskRequest, run_id=run_id, task_id=task_id))

    async def output_in(self, ended: run_pb2.TaskRun, run_id: str, task: LatticeTask | TaskOutput | str) -> Any:
        """Return what `opened` turns into the output of a task that ended, or its error."""
        task_id = ended.task_id
        if (failed := graphs.lack_of(ended)) is not None:
            return failed
        items = await self.list_tasks(run_id, with_outputs=True) if ended.item_count else []
        items = [item for item in items if item.parent_task_id == task_id]
        owner = task.owner if isinstance(task, TaskOutput) else task
        known = graphs.declared_by([owner] if isinstance(owner, LatticeTask) else ())
        declared = known.get(task_id) or _declared(run_id).get(task_id, ())
        outputs = await graphs.outputs_of(ended, items, self._transfer.fetch, declared) or {}
        if isinstance(task, TaskOutput) and task.output not in outputs:
            text = f"task {task_id!r} of run {str(run_id)!r} has no output {task.output!r}"
            return errors.RunError(run_id, f"{text}; its outputs: {', '.join(map(repr, outputs)) or 'none'}")
        found = graphs.value_of(outputs, task)
        return Part(run_id, task, found) if isinstance(task, TaskOutput) and task.path else found

    async def list_tasks(self, run_id: str, with_outputs: bool = False) -> list[run_pb2.TaskRun]:
        """As `AsyncLatticeClient.list_tasks`."""
        view = run_pb2.VIEW_FULL if with_outputs else run_pb2.VIEW_BASIC
        request = made(task_pb2.ListTasksRequest, run_id=run_id, view=view, page_size=PAGE_SIZE)
        found: list[run_pb2.TaskRun] = []
        while True:
            response = await self._rpc.call(self._rpc.tasks.ListTasks, request)
            found.extend(response.tasks)
            request.page_token = response.next_page_token
            if not request.page_token:
                return found

    async def fetched_events(
        self, run_id: str, after: int = 0, fetch: graphs.Decode | None = None, on_loss: OnLoss | None = None
    ) -> AsyncIterator[RunEvent]:
        """As `events`, with outputs as `fetch` returns them; by default for `opened`. `on_loss` is told of a break."""
        breaks = Reconnection(self._rpc, run_id, on_loss)
        is_complete = False
        while not is_complete:
            request = made(results_pb2.WatchRunRequest, run_id=run_id, after_sequence=after)
            try:
                async for response in self._rpc.stream(self._rpc.results.WatchRun, request):
                    breaks.heard()
                    for message in response.events:
                        yield await graphs.event_of(message, fetch or self._transfer.fetch, _declared(run_id))
                    after, is_complete = response.sequence, response.complete
            except errors.RequestError as error:
                if not is_complete:
                    await breaks.wait(error)

    async def _get_result(self, run_id: str) -> results_pb2.GetResultResponse:
        request = made(results_pb2.GetResultRequest, run_id=run_id, wait=duration(WAIT_S))
        return await self._until(run_id, self._rpc.results.GetResult, request, lambda r: r.run.state in TERMINAL)

    async def _until(
        self, run_id: str, method: "UnaryUnaryMultiCallable[Q, R]", request: Q, is_over: Callable[[R], bool]
    ) -> R:
        """Make a call that waits, again until its response is the one waited for. Raises RequestError."""
        breaks = Reconnection(self._rpc, run_id)
        while True:
            try:
                response = await self._rpc.call(method, request)
            except errors.RequestError as error:
                await breaks.wait(error)
                continue
            breaks.heard()
            if is_over(response):
                return response


def _declared(run_id: str) -> graphs.Declared:
    return run_id.declared if isinstance(run_id, RunId) else {}
