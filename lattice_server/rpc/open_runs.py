"""Serves the streams of open runs.

Rule: a refused opening ends the stream with a status. Later refusals are messages, and the stream stays open.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial

from lattice.v1 import errors_pb2, run_pb2, workflow_pb2

from lattice_server.core.errors import LatticeError, invalid_field
from lattice_server.core.messages import RunEvent
from lattice_server.core.model import Failure, Payload
from lattice_server.engine.commands.open_runs import TOLD, OpenRuns
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.runs.caller_stream import CallerStream
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.runs.log import BATCH
from lattice_server.rpc import callers
from lattice_server.rpc.chunking import PART_BYTES, in_parts
from lattice_server.rpc.convert.events import event_to_proto
from lattice_server.rpc.convert.payloads import failure_from_proto, question_from_proto
from lattice_server.rpc.convert.runs import question_to_proto, run_to_proto
from lattice_server.rpc.handlers import PEER_END_S, OnError
from lattice_server.rpc.statuses import internal_error, refusal_of

log = logging.getLogger(__name__)

Requests = AsyncIterator[workflow_pb2.OpenRunRequest]
Start = Callable[[workflow_pb2.RunWorkflowRequest], Awaitable[tuple[RunEntry, bool]]]
Recall = Callable[[workflow_pb2.OpenRunOpening], Awaitable[None]]
Add = Callable[[workflow_pb2.AddTasksRequest], Awaitable[workflow_pb2.AddTasksResponse]]


class OpenRunStreams:
    """The streams of `WorkflowService.OpenRun`. `start` starts the run of a request, `add` adds tasks to a run.

    `recall` is called before with each opening; `on_error` is called with the reason of each refusal.
    """

    def __init__(
        self,
        orchestrator: Orchestrator,
        question_limit_bytes: int,
        start: Start,
        add: Add,
        recall: Recall | None,
        on_error: OnError,
    ) -> None:
        self._orchestrator = orchestrator
        self._limit_bytes = question_limit_bytes
        self._start = start
        self._add = add
        self._recall = recall
        self._on_error = on_error

    async def serve(self, request_iterator: Requests) -> AsyncGenerator[workflow_pb2.OpenRunResponse]:
        """Serve one stream. Raises LatticeError for an opening that is refused."""
        requests = aiter(request_iterator)
        first = await anext(requests, None)
        if first is None or not first.HasField("opening"):
            raise invalid_field("opening", "the first message opens a run, or takes one over")
        opening = first.opening
        if self._recall is not None:
            await self._recall(opening)
        entry, created = await self._opened(opening)
        if opening.after_sequence < 0:
            raise invalid_field("opening.after_sequence", "must not be negative")
        entry.log.check_cursor(opening.after_sequence)
        holder = self._orchestrator.open_runs.hold(entry)
        stream = _Stream(
            entry, holder, self._orchestrator.open_runs, self._add, self._limit_bytes, on_error=self._on_error
        )
        reading = asyncio.create_task(stream.read(requests))
        try:
            accepted = workflow_pb2.RunWorkflowResponse(run=run_to_proto(entry), created=created)
            yield workflow_pb2.OpenRunResponse(accepted=accepted)
            async for response in stream.responses(opening.after_sequence):
                yield response
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PEER_END_S):
                    await asyncio.shield(reading)
        finally:
            reading.cancel()
            self._orchestrator.open_runs.leave(entry, holder)

    async def _opened(self, opening: workflow_pb2.OpenRunOpening) -> tuple[RunEntry, bool]:
        match opening.WhichOneof("start"):
            case "run":
                return await self._start(opening.run)
            case "run_id":
                return self._orchestrator.run(opening.run_id, callers.reach()), False
            case _:
                raise invalid_field("opening.start", "name a run to start, or one to take over")


class _Stream:
    """One stream: reads the messages of its caller, and makes the responses."""

    def __init__(
        self,
        entry: RunEntry,
        holder: CallerStream,
        open_runs: OpenRuns,
        add: Add,
        limit_bytes: int,
        *,
        on_error: OnError,
    ) -> None:
        self._entry = entry
        self._holder = holder
        self._open_runs = open_runs
        self._add = add
        self._limit_bytes = limit_bytes
        self._on_error = on_error
        self._results: list[workflow_pb2.AdditionResult] = []
        self._refused: list[str] = []
        self._answers = 0
        self._told_answers = 0
        self._stopped: LatticeError | None = None

    async def read(self, requests: Requests) -> None:
        """Process the messages of the caller, to the end of its side of the stream."""
        try:
            async for request in requests:
                for addition in request.additions:
                    # Awaited first: `responses` may replace the list meanwhile.
                    result = await self._added(addition)
                    self._results.append(result)
                for answer in request.answers:
                    self._take_answer(answer)
                if request.close:
                    self._open_runs.close(self._entry, self._holder)
                if request.additions or self._refused:
                    self._holder.news.set()
            # grpcio does not tell a caller that ended its side from a broken stream.
            self._open_runs.fall_silent(self._entry, self._holder)
        except LatticeError as error:
            # A message that is too large, or cannot be decoded.
            self._stop(error)
        except Exception:
            bug = internal_error()
            log.exception("a stream of an open run failed", extra={"run_id": self._entry.run_id, **bug.metadata})
            self._stop(bug)

    def _stop(self, error: LatticeError) -> None:
        self._stopped = error
        self._holder.news.set()

    async def _added(self, request: workflow_pb2.AddTasksRequest) -> workflow_pb2.AdditionResult:
        run_id = self._entry.run_id
        result = workflow_pb2.AdditionResult(request_id=request.request_id)
        try:
            if self._holder.taken_over is not None:
                raise self._holder.taken_over
            if request.WhichOneof("parent") is not None and request.run_id != run_id:
                raise invalid_field("run_id", f"this stream is of run {run_id!r}; name that run, or none")
            request.run_id = run_id
            result.added.CopyFrom(await self._add(request))
        except LatticeError as error:
            result.refused.CopyFrom(self._refusal(error))
        return result

    def _refusal(self, error: LatticeError) -> errors_pb2.Refusal:
        self._on_error(error.reason)
        return refusal_of(error)

    def _take_answer(self, message: workflow_pb2.QuestionAnswer) -> None:
        self._answers += 1
        answer: Payload | Failure | str
        is_taken = True
        match message.WhichOneof("answer"):
            case "failure":
                answer = failure_from_proto(message.failure)
            case "payload":
                try:
                    answer = question_from_proto(message.payload, self._limit_bytes)
                except LatticeError as error:
                    answer, is_taken = f"the caller's answer cannot be delivered: {error.message}", False
            case _:
                answer, is_taken = "the caller's answer has neither a value nor a failure", False
        if not self._open_runs.answer(self._entry, self._holder, message.question_id, answer) or not is_taken:
            self._refused.append(message.question_id)

    async def responses(self, after: int) -> AsyncIterator[workflow_pb2.OpenRunResponse]:
        """Yield the responses, with events after a number, to the end of the run or the stream."""
        run_log, holder = self._entry.log, self._holder
        while True:
            await holder.news.wait()
            holder.news.clear()
            stopped = self._stopped or holder.taken_over
            if stopped is not None:
                yield workflow_pb2.OpenRunResponse(stopped=self._refusal(stopped))
                return
            response = workflow_pb2.OpenRunResponse()
            for part in self._due(response):
                yield part
            while after < len(run_log.events):
                batch = run_log.events[after : after + BATCH]
                after += len(batch)
                for events in self._shown(batch):
                    response.events.extend(events)
                    response.sequence = events[-1].sequence
                    yield response
                    response = workflow_pb2.OpenRunResponse()
            if run_log.is_complete and after == len(run_log.events) and not self._results:
                response.ended.CopyFrom(run_to_proto(self._entry))
                response.sequence = after
                yield response
                return
            if response.ByteSize():
                yield response

    def _due(self, response: workflow_pb2.OpenRunResponse) -> Iterator[workflow_pb2.OpenRunResponse]:
        """Write all that is due except events into a message; yield the message whenever it is large enough."""
        results, self._results = self._results, []
        refused, self._refused = self._refused, []
        questions, withdrawn = self._holder.take()
        response.additions.extend(results)
        response.withdrawn_question_ids.extend(withdrawn)
        response.refused_question_ids.extend(refused)
        if self._told_answers < self._answers:
            response.received_answers = self._told_answers = self._answers
        size = 0
        for question in questions:
            message = question_to_proto(question)
            size += message.ByteSize()
            if size > PART_BYTES and response.questions:
                yield response
                response.Clear()
                size = message.ByteSize()
            response.questions.append(message)

    def _shown(self, batch: Sequence[RunEvent]) -> Iterator[list[run_pb2.RunEvent]]:
        show = partial(event_to_proto, self._entry.run.tasks)
        return in_parts(show(event) for event in batch if isinstance(event.fact, TOLD))
