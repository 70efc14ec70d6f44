"""Owns the stream of one open run: its messages in both directions, and its resumption.

Rule: a request that a broken stream may have lost is sent again, and a repeated message has no second effect.
"""

import threading
from collections.abc import Callable
from contextlib import suppress

from lattice.v1 import run_pb2, workflow_pb2

from lattice_client import errors
from lattice_client.runs.answers import Answers
from lattice_client.runs.task_ends import TaskEnds
from lattice_client.transport import statuses
from lattice_client.transport.channel import BidiCall, Channel, LimitReachedError
from lattice_client.transport.reconnection import MAX_BACKOFF_S, Reconnection

# How long the run waits for a new stream after a time limit of the caller ended the present one.
REOPEN_S = 5.0

Stream = BidiCall[workflow_pb2.OpenRunRequest, workflow_pb2.OpenRunResponse]


class OpenRunStream:
    """The stream of one open run. `on_question` and `on_withdrawal` are called once for each question.

    `step` is called by one thread at a time; the other methods may be called by any thread.
    """

    def __init__(self, channel: Channel, opening: workflow_pb2.OpenRunOpening, grace_s: float) -> None:
        self.on_question: Callable[[workflow_pb2.Question], None] = _ignore
        self.on_withdrawal: Callable[[str], None] = _ignore
        self.run_id = ""
        self.ended: run_pb2.Run | None = None
        self.results: dict[str, workflow_pb2.AdditionResult] = {}
        self.task_ends = TaskEnds()
        self._rpc = channel
        self._opening = opening
        self._stream: Stream | None = None
        # The server cancels the run when it has no stream for the grace period.
        self._max_backoff_s = min(MAX_BACKOFF_S, grace_s / 10)
        self._reconnection: Reconnection | None = None
        self._additions: dict[str, workflow_pb2.AddTasksRequest] = {}
        self._answers = Answers()
        self._is_closed = False
        self._lock = threading.RLock()

    async def open(self) -> None:
        """Open a stream, for the first time or again. Raises RequestError, LimitReachedError."""
        stream: Stream = self._rpc.open_bidi(self._rpc.workflows.OpenRun)
        stream.send(workflow_pb2.OpenRunRequest(opening=self._opening))
        try:
            first = await stream.read()
            if first is None:
                raise errors.UnavailableError("the server ended the stream of a run before it accepted the run")
        except BaseException:
            stream.abandon()
            raise
        if self._reconnection is None:
            self.run_id = first.accepted.run.run_id
            self._reconnection = Reconnection(self._rpc, self.run_id, max_backoff_s=self._max_backoff_s)
        self._reconnection.succeeded()
        with self._lock:
            self._opening.run_id = self.run_id  # replaces the request that started the run
            self._answers.restart()
            self._stream = stream
            for addition in self._additions.values():
                stream.send(workflow_pb2.OpenRunRequest(additions=[addition]))
            if self._is_closed:
                stream.send(workflow_pb2.OpenRunRequest(close=True))

    async def step(self) -> bool:
        """Read the next message; return whether another may follow. Raises RequestError, LimitReachedError."""
        assert self._reconnection is not None, "open was called first"
        if self.ended is not None:
            return False
        try:
            if (stream := self._stream) is None:
                await self.open()
                return True
            response = await stream.read()
        except errors.RequestError as error:
            self.abandon()
            await self._reconnection.wait(error)
            return True
        except LimitReachedError:
            # The limit of the caller ended the stream; the run needs another one.
            self.abandon()
            with suppress(errors.RequestError, LimitReachedError):
                async with self._rpc.limit(REOPEN_S):
                    await self.open()
            raise
        except BaseException:
            self.abandon()
            raise
        if response is None:
            self.abandon()
            return True
        self._reconnection.succeeded()
        with self._lock:
            self._receive(response)
        return self.ended is None

    def abandon(self) -> None:
        """Cancel the stream; `open` or `step` can open another one. May be called by a finalizer."""
        with self._lock:
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.abandon()

    def release(self) -> None:
        """Cancel the stream, and drop the handlers: they refer to objects that refer to this one."""
        self.abandon()
        self.on_question = self.on_withdrawal = _ignore

    def _receive(self, response: workflow_pb2.OpenRunResponse) -> None:
        for result in response.additions:
            if self._additions.pop(result.request_id, None) is not None:
                self.results[result.request_id] = result
        self._answers.acknowledge(response.received_answers)
        for question in response.questions:
            self._receive_question(question)
        for question_id in response.withdrawn_question_ids:
            self._answers.withdraw(question_id)
            self.on_withdrawal(question_id)
        for event in response.events:
            self.task_ends.add(event)
        self._opening.after_sequence = max(self._opening.after_sequence, response.sequence)
        if response.HasField("ended"):
            self.ended = response.ended
            self.abandon()
        elif response.HasField("stopped"):
            self.abandon()
            raise statuses.from_refusal(response.stopped)

    def _receive_question(self, question: workflow_pb2.Question) -> None:
        if (given := self._answers.given(question.question_id)) is not None:
            self._send_answer(given)  # the broken stream lost it
        elif self._answers.ask(question.question_id):
            self.on_question(question)

    def add(self, request: workflow_pb2.AddTasksRequest) -> None:
        """Send tasks to add; a later step puts the outcome into `results`."""
        with self._lock:
            self._additions[request.request_id] = request
            if self._stream is not None:
                self._stream.send(workflow_pb2.OpenRunRequest(additions=[request]))

    def answer(self, answer: workflow_pb2.QuestionAnswer) -> bool:
        """Answer a question; return False when it was answered or withdrawn before."""
        with self._lock:
            if not self._answers.answer(answer):
                return False
            self._send_answer(answer)
            return True

    def _send_answer(self, answer: workflow_pb2.QuestionAnswer) -> None:
        if self._stream is not None:
            self._answers.sent(answer)
            self._stream.send(workflow_pb2.OpenRunRequest(answers=[answer]))

    def close(self) -> None:
        """Tell the server that no more tasks will be added."""
        with self._lock:
            if not self._is_closed and self._stream is not None:
                self._stream.send(workflow_pb2.OpenRunRequest(close=True))
            self._is_closed = True


def _ignore(message: object) -> None:
    """Handle a message without any effect."""
