"""Owns the stream over which a client starts runs. Rule: when the stream breaks, unary calls take its place.

A message of an open stream costs a fraction of a call. Every request names its run by an id, so that a call can safely
repeat a request that the stream may have sent.
"""

import asyncio
import itertools
import sys
import threading
import weakref
from typing import cast

from lattice.v1 import task_pb2, workflow_pb2

from lattice_client import errors
from lattice_client.transport import statuses
from lattice_client.transport.channel import BidiCall, Channel, Mailbox
from lattice_client.transport.tracing import trace_headers

Request = workflow_pb2.ExecuteWorkflowsRequest
Response = workflow_pb2.ExecuteWorkflowsResponse
# A larger request would delay those of other threads, and the server reads it in parts.
MAX_REQUEST_BYTES = 64 * 1024
# The most runs that wait on one stream for their ends; the ends of others are asked for by calls.
MAX_WAITING = 1000


class Execution:
    """A run, or a task, that was sent over a stream, over which its answers come.

    A run that ends with its caller `is_alone` on its stream: the server cancels it when the stream is left.
    """

    def __init__(self, stream: "_Stream", number: int, box: Mailbox[Response | None], *, is_alone: bool) -> None:
        self._stream = stream
        self._is_alone = is_alone
        self._number = number
        self._box = box

    async def accepted(self) -> Response | None:
        """Wait for the first answer. None when the stream broke, or cannot be read here."""
        return await self._stream.delivery.get(self._box)

    async def ended(self) -> Response | None:
        """Wait for the last answer. None when the stream broke, or cannot be read here.

        Raises LimitReachedError.
        """
        if not self._box.is_here():
            return None
        try:
            found = await self._stream.delivery.get(self._box)
        except BaseException:
            if self._is_alone:
                self.abandon()
            raise
        self._box.put(found)  # For the next reader.
        return found

    def abandon(self) -> None:
        """Wait no more. May be called from any thread, and by a finalizer."""
        self._stream.waiting.pop(self._number, None)
        if self._is_alone:
            self._stream.abandon()


class Executions:
    """Starts runs and tasks over a stream of each connection of a channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._lock = threading.Lock()
        self._is_reached = False

    def note_call(self) -> None:
        """Note that a call has started a run: the server is reached, so that the next ones are sent over a stream."""
        self._is_reached = True

    async def start(self, request: workflow_pb2.RunWorkflowRequest) -> Execution | None:
        """Start a run. None when a call has to start it. Raises RequestError when the server refuses it."""
        if request.HasField("cancel_on_disconnect") and not _is_patched():
            return (await self._send(Request(run=request), self._new_stream(), is_alone=True))[1]
        if not self._is_small(request):
            return None
        return (await self._send(Request(run=request), self._stream()))[1]

    async def run_task(self, request: task_pb2.RunTaskRequest) -> task_pb2.RunTaskResponse | None:
        """Run one task; return the server's answer, as `TaskService.RunTask`.

        None when a call has to run it. Raises RequestError when the server refuses it.
        """
        if request.HasField("cancel_on_disconnect") or not self._is_small(request):
            return None
        answer, _ = await self._send(Request(task=request), self._stream())
        return None if answer is None else answer.task

    def _is_small(self, request: workflow_pb2.RunWorkflowRequest | task_pb2.RunTaskRequest) -> bool:
        is_offered = self._is_reached and not _is_patched()
        return is_offered and request.ByteSize() <= MAX_REQUEST_BYTES and not trace_headers()

    async def _send(
        self, request: Request, stream: "_Stream", *, is_alone: bool = False
    ) -> tuple[Response | None, Execution | None]:
        """Send a request; return its first answer and its execution. None when a unary call has to be made."""
        if len(stream.waiting) >= MAX_WAITING:
            return None, None
        execution = stream.send(request, self._channel.mailbox(), is_alone=is_alone)
        try:
            answer = await execution.accepted()
        except BaseException:
            execution.abandon()
            raise
        if answer is None:
            # A call tells why, or comes through.
            self._is_reached = False
            return None, None
        if answer.HasField("refused"):
            execution.abandon()
            refusal = statuses.from_refusal(answer.refused)
            if isinstance(refusal, errors.UnavailableError) or refusal.reason == "TOO_MANY_OPEN_RUNS":
                return None, None
            raise refusal
        return answer, execution

    def _stream(self) -> "_Stream":
        kept = self._channel.kept()
        stream = kept.get(_Stream)
        if stream is None or stream.is_broken:
            with self._lock:
                stream = kept.get(_Stream)
                if stream is None or stream.is_broken:
                    stream = kept[_Stream] = self._new_stream()
        return cast(_Stream, stream)

    def _new_stream(self) -> "_Stream":
        stream = _Stream(self._channel, self._channel.open_bidi(self._channel.workflows.ExecuteWorkflows))
        weakref.finalize(self, stream.abandon).atexit = False
        return stream


class _Stream:
    """One stream. `waiting` has the requests without a last answer, by number."""

    def __init__(self, channel: Channel, call: BidiCall[Request, Response]) -> None:
        self._call = call
        self.delivery = channel.delivery(self._step)
        self._numbers = itertools.count(1)
        self.waiting: dict[int, Mailbox[Response | None]] = {}
        self.is_broken = False
        self._is_abandoned = False

    def send(self, request: Request, box: Mailbox[Response | None], *, is_alone: bool) -> Execution:
        """Send a request, whose answers are put into a mailbox, or None when the stream breaks."""
        number = request.number = next(self._numbers)
        self.waiting[number] = box
        self._call.send(request)
        if self.is_broken:
            # It broke before the mailbox was known.
            box.put(None)
        return Execution(self, number, box, is_alone=is_alone)

    def abandon(self) -> None:
        """Cancel the stream. May be called from any thread, and by a finalizer."""
        self._is_abandoned = True
        self._call.abandon()

    async def _step(self) -> bool:
        """Deliver the next answer; return False at the end of the stream."""
        try:
            response = await self._call.read()
        except (errors.RequestError, errors.ClientClosedError):
            response = None  # Calls will tell.
        except asyncio.CancelledError:
            self._break()
            # gRPC raises it in the reader of a stream that was cancelled here.
            if not self._is_abandoned:
                raise
            return False
        except BaseException:
            self._break()
            raise
        if response is None:
            self._break()
            return False
        is_last = response.WhichOneof("message") != "accepted"
        box = (self.waiting.pop if is_last else self.waiting.get)(response.number, None)
        if box is not None:
            box.put(response)
        return True

    def _break(self) -> None:
        self.is_broken = True
        self._call.abandon()
        for box in list(self.waiting.values()):
            box.put(None)


def _is_patched() -> bool:
    """Whether gevent has replaced threads in this program: a stream that waits could hold up all its greenlets."""
    found = sys.modules.get("gevent.monkey")
    return found is not None and bool(found.is_module_patched("threading"))
