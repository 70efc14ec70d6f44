"""Serves the streams of `WorkflowService.ExecuteWorkflows`, each of which starts any number of runs.

Rule: a refused run is a message, and the stream stays open. Requests are taken one after the other; runs end in any
order. A large result is made while others are sent. A caller that does not read its answers has at most `MAX_OPEN` runs
on a stream, whose results stay in the runs.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from google.protobuf.message import Message
from lattice.v1 import results_pb2, task_pb2, workflow_pb2

from lattice_server import background
from lattice_server.core.errors import ExhaustedError, LatticeError, invalid_field
from lattice_server.engine.commands.tethers import Tethers
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.slices import Slices
from lattice_server.rpc.convert.runs import result_to_proto
from lattice_server.rpc.handlers import OnError
from lattice_server.rpc.statuses import internal_error, refusal_of

log = logging.getLogger(__name__)

MAX_OPEN = 4096
# A result of more tasks takes milliseconds to make.
LARGE_TASKS = 100
Requests = AsyncIterator[workflow_pb2.ExecuteWorkflowsRequest]
Start = Callable[[workflow_pb2.RunWorkflowRequest], Awaitable[tuple[RunEntry, bool]]]
RunTask = Callable[[task_pb2.RunTaskRequest], Awaitable[task_pb2.RunTaskResponse]]
Recall = Callable[[Message], Awaitable[None]]
Response = workflow_pb2.ExecuteWorkflowsResponse


class ExecutionStreams:
    """The streams. `start` starts the run of a request; `run_task` runs one task, and returns when it has ended.

    `recall` is called before with each request for a run; `on_error` is called with the reason of each refusal.
    """

    def __init__(
        self,
        orchestrator: Orchestrator,
        slices: Slices,
        start: Start,
        run_task: RunTask,
        recall: Recall | None,
        on_error: OnError,
    ) -> None:
        self._orchestrator = orchestrator
        self._slices = slices
        self._handlers = start, run_task, recall, orchestrator.tethers, on_error
        self._streams: set[_Stream] = set()
        self._is_stopping = False

    async def serve(self, requests: Requests) -> AsyncGenerator[Response]:
        """Serve one stream. Raises LatticeError for a message that is too large or cannot be read."""
        stream = _Stream(self._result_of, *self._handlers, is_read=self._is_stopping)
        self._streams.add(stream)
        reading = asyncio.create_task(stream.read(requests))
        try:
            while (found := await stream.next()) is not None:
                if isinstance(found, Response):
                    yield found
                    continue
                yield Response(number=found.number, ended=await (found.making or self._result_of(found.entry)))
                self._orchestrator.ended.note_read(found.entry)
            if reading.done():
                reading.result()
        finally:
            self._streams.discard(stream)
            reading.cancel()
            stream.close()

    async def _result_of(self, entry: RunEntry) -> results_pb2.GetResultResponse:
        return await result_to_proto(entry, self._slices)

    def stop(self) -> None:
        """Take no more requests, and end the streams that wait for no run."""
        self._is_stopping = True
        for stream in self._streams:
            stream.finish()


@dataclass(slots=True)
class _Ended:
    """A run that has ended. Its result is being made if it is large, and otherwise when it is sent."""

    number: int
    entry: RunEntry
    is_large: bool
    making: "asyncio.Task[results_pb2.GetResultResponse] | None" = None

    @property
    def is_ready(self) -> bool:
        """Whether it can be sent now."""
        return not self.is_large or (self.making is not None and self.making.done())


class _Stream:
    """One stream: takes requests, and has the responses that are due."""

    def __init__(
        self,
        result_of: Callable[[RunEntry], Coroutine[Any, Any, results_pb2.GetResultResponse]],
        start: Start,
        run_task: RunTask,
        recall: Recall | None,
        tethers: Tethers,
        on_error: OnError,
        *,
        is_read: bool,
    ) -> None:
        self._result_of = result_of
        self._start = start
        self._run_task = run_task
        self._recall = recall
        self._tethers = tethers
        self._on_error = on_error
        self._due: deque[Response | _Ended] = deque()
        self._open: dict[int, Callable[[], object]] = {}  # How each run on the stream is left.
        self._news = asyncio.Event()
        self._is_read = is_read
        self._is_broken = False

    async def read(self, requests: Requests) -> None:
        """Take the requests of the caller, to the end of its side of the stream."""
        try:
            async for request in requests:
                await self._take(request)
        except BaseException:
            # Requests after this one would wait for the end of the runs before it.
            self._is_broken = True
            raise
        finally:
            self.finish()

    def finish(self) -> None:
        """End the stream when the runs on it have ended."""
        self._is_read = True
        self._news.set()

    def close(self) -> None:
        """Leave the runs on the stream, which continue."""
        for leave in self._open.values():
            leave()
        for due in self._due:
            if isinstance(due, _Ended) and due.making is not None:
                due.making.cancel()

    async def next(self) -> Response | _Ended | None:
        """Wait for a response, or an ended run; None at the end of the stream."""
        while True:
            for position, due in enumerate(self._due):
                if isinstance(due, Response) or due.is_ready:
                    del self._due[position]
                    return due
            if self._due:
                self._make(self._due[0])
            elif self._is_broken or (self._is_read and not self._open):
                return None
            self._news.clear()
            await self._news.wait()

    def _make(self, due: "Response | _Ended") -> None:
        """Have a large result made. One at a time, which a caller that does not read keeps from being sent."""
        if isinstance(due, _Ended) and due.making is None:
            due.making = background.share(self._result_of(due.entry))
            due.making.add_done_callback(lambda _: self._news.set())

    async def _take(self, request: workflow_pb2.ExecuteWorkflowsRequest) -> None:
        number = request.number
        try:
            if number in self._open:
                raise invalid_field("number", f"run {number} of this stream has not ended")
            if len(self._open) >= MAX_OPEN:
                text = f"{MAX_OPEN} runs of this stream have not ended; start others by another call"
                raise ExhaustedError("TOO_MANY_OPEN_RUNS", text)
            kind = request.WhichOneof("start")
            if kind is not None and self._recall is not None:
                await self._recall(getattr(request, kind))
            match kind:
                case "run":
                    entry, created = await self._start(request.run)
                    accepted = workflow_pb2.RunAccepted(run_id=entry.run_id, created=created)
                    self._put(Response(number=number, accepted=accepted))
                    ended = partial(self._end, number, entry)
                    leaving = contextlib.ExitStack()
                    leaving.callback(entry.log.forget, ended)
                    leaving.enter_context(self._tethers.held(entry, entry.disconnect_grace_s))
                    self._open[number] = leaving.close
                    entry.log.when_complete(ended)
                case "task":
                    # A task of its own, because it waits for the end of the run.
                    answer = self._answer(number, request.task)
                    work = background.start(answer, partial(self._fail_answer, number))
                    self._open[number] = work.cancel
                case _:
                    raise invalid_field("start", "name a workflow to run, or a task")
        except Exception as error:
            self._put(self._refusal(number, error))

    def _end(self, number: int, entry: RunEntry) -> None:
        self._open.pop(number)()
        is_large = len(entry.run.final_task_ids()) > LARGE_TASKS
        self._put(_Ended(number, entry, is_large))

    async def _answer(self, number: int, request: task_pb2.RunTaskRequest) -> None:
        try:
            response = Response(number=number, task=await self._run_task(request))
        except Exception as error:
            response = self._refusal(number, error)
        del self._open[number]
        self._put(response)

    def _fail_answer(self, number: int, error: BaseException) -> None:
        self._open.pop(number, None)
        self._put(self._refusal(number, error))

    def _put(self, due: Response | _Ended) -> None:
        self._due.append(due)
        self._news.set()

    def _refusal(self, number: int, error: BaseException) -> Response:
        if not isinstance(error, LatticeError):
            bug, error = error, internal_error()
            log.error("a run of a stream failed to start", exc_info=bug, extra=error.metadata)
        self._on_error(error.reason)
        return Response(number=number, refused=refusal_of(error))
