"""Serves `ResultsService`: events and results."""

from collections.abc import AsyncIterator
from typing import Any

from lattice.v1 import results_pb2, results_pb2_grpc

from lattice_server.core.errors import invalid_field
from lattice_server.core.messages import RunEvent, RunFinished, RunStarted, TaskLogged
from lattice_server.core.states import TASK_TERMINAL
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.runs.chunk_store import log_of
from lattice_server.engine.slices import Slices
from lattice_server.rpc import callers
from lattice_server.rpc.chunking import in_parts
from lattice_server.rpc.convert.runs import result_to_proto
from lattice_server.rpc.convert.streams import batch_to_proto
from lattice_server.rpc.convert.times import disconnect_grace_from_proto, wait_from_proto
from lattice_server.rpc.encoded_events import ReadRuns, response
from lattice_server.rpc.handlers import Context


class ResultsServicer(results_pb2_grpc.ResultsServiceServicer):
    """The `ResultsService`."""

    def __init__(self, orchestrator: Orchestrator, slices: Slices) -> None:
        self._orchestrator = orchestrator
        self._slices = slices
        self._read_runs = ReadRuns()

    async def WatchRun(self, request: results_pb2.WatchRunRequest, context: Context) -> AsyncIterator[Any]:
        """Stream the events of a run, from a number on, to its end."""
        if request.after_sequence < 0:
            raise invalid_field("after_sequence", "must not be negative")
        entry = self._orchestrator.run(request.run_id, callers.reach())
        wanted = frozenset(request.task_ids)
        newest = len(entry.log.events)
        with self._read_runs.reading(entry) as encoded:
            async for batch in entry.log.follow(request.after_sequence):
                last = batch[-1].sequence
                complete = entry.log.is_complete and last == len(entry.log.events)
                shown = [event for event in batch if _is_wanted(event, wanted, request.exclude_logs)]
                # The last part closes the batch; one without events moves the watermark.
                *parts, closing = [*in_parts(map(encoded.encode, shown))] or [[]]
                sent = 0
                for events in parts:
                    sent += len(events)
                    yield response(events, shown[sent - 1].sequence)
                # A reader learns that it has all events there were when it called, also when none of them was wanted.
                has_caught_up = batch[0].sequence <= newest <= last
                if shown or complete or has_caught_up:
                    yield response(closing, last, complete=complete)
        if request.after_sequence == len(entry.log.events):
            yield results_pb2.WatchRunResponse(sequence=request.after_sequence, complete=True)
        if not wanted:
            self._orchestrator.ended.note_read(entry)

    async def WatchChunks(
        self, request: results_pb2.WatchChunksRequest, context: Context
    ) -> AsyncIterator[results_pb2.WatchChunksResponse]:
        """Stream the chunks of one task or of all tasks of a run, from any number on, to its end."""
        task_id, reach = request.task_id, callers.reach()
        find = self._orchestrator
        entry = find.task(request.run_id, task_id, reach) if task_id else find.run(request.run_id, reach)
        for name, sequence in request.after_sequence.items():
            if sequence < 0:
                raise invalid_field(f'after_sequence["{name}"]', "must not be negative")

        def is_over() -> bool:
            return entry.log.is_complete or bool(task_id and entry.run.tasks[task_id].state in TASK_TERMINAL)

        async for batch in log_of(entry).follow(task_id, dict(request.after_sequence), is_over):
            for message in batch_to_proto(batch):
                yield message
        yield results_pb2.WatchChunksResponse(complete=True)

    async def GetResult(self, request: results_pb2.GetResultRequest, context: Context) -> results_pb2.GetResultResponse:
        """Return a run and the outputs of its final tasks."""
        entry = self._orchestrator.run(request.run_id, callers.reach())
        wait_s, grace_s = wait_from_proto(request.wait, "wait"), disconnect_grace_from_proto(request)
        with self._orchestrator.tethers.held(entry, grace_s):
            await entry.log.completed(wait_s)
        response = await result_to_proto(entry, self._slices)
        self._orchestrator.ended.note_read(entry)
        return response


def _is_wanted(event: RunEvent, task_ids: frozenset[str], exclude_logs: bool) -> bool:
    fact = event.fact
    if exclude_logs and isinstance(fact, TaskLogged):
        return False
    if not task_ids or isinstance(fact, RunStarted | RunFinished):
        return True
    return getattr(fact, "task_id", None) in task_ids or not hasattr(fact, "task_id")
