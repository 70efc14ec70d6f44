"""Owns the stream that holds an open run: what was said on it, what is still to be said, and its resumption.

Rule: what a break may have lost is said again, and what came is not taken twice.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

from lattice.v1 import run_pb2, workflow_pb2

from lattice_client import errors
from lattice_client.transport.channel import Channel, Conversation, LimitReachedError
from lattice_client.transport.reconnection import MAX_BACKOFF_S, Reconnection
from lattice_client.transport.requests import made

# Of the ends of tasks these are kept here, for the newest; others can be asked for.
KEPT_BYTES = 64 * 1024 * 1024
# How long a run that is held waits for its stream, when a wait for something else ended that.
REOPEN_S = 5.0

STATES = {
    "task_succeeded": run_pb2.TASK_STATE_SUCCEEDED,
    "task_failed": run_pb2.TASK_STATE_FAILED,
    "task_cancelled": run_pb2.TASK_STATE_CANCELLED,
    "task_skipped": run_pb2.TASK_STATE_SKIPPED,
}
Talk = Conversation[workflow_pb2.OpenRunRequest, workflow_pb2.OpenRunResponse]


class Hold:
    """One run held open. `on_question` and `on_withdrawal` are told of questions; each question is told once.

    Steps are made by one thread at a time.
    """

    def __init__(self, rpc: Channel, opening: workflow_pb2.OpenRunOpening, grace_s: float) -> None:
        self.on_question: Callable[[workflow_pb2.Question], None] = lambda question: None
        self.on_withdrawal: Callable[[str], None] = lambda question_id: None
        self.run_id = ""
        self.ended: run_pb2.Run | None = None
        self.results: dict[str, workflow_pb2.AdditionResult] = {}
        self._rpc = rpc
        self._opening = opening
        self._talk: Talk | None = None
        self._breaks: Reconnection | None = None
        # The server waits for so long for another stream.
        self._max_backoff_s = min(MAX_BACKOFF_S, grace_s / 10)
        self._additions: dict[str, workflow_pb2.AddTasksRequest] = {}
        self._ends: dict[str, run_pb2.RunEvent | None] = {}
        self._kept: deque[str] = deque()
        self._kept_bytes = 0
        self._asked: set[str] = set()
        self._answers: dict[str, workflow_pb2.QuestionAnswer] = {}  # Those that the server may not have.
        self._sent: deque[str] = deque()  # Of these, those that were sent on this stream, in order.
        self._counted = 0
        self._is_closed = False
        self._lock = threading.RLock()

    async def open(self) -> None:
        """Open a stream; again after a break. Raises RequestError, LimitReachedError."""
        talk: Talk = self._rpc.converse(self._rpc.workflows.OpenRun)
        talk.send(workflow_pb2.OpenRunRequest(opening=self._opening))
        try:
            first = await talk.read()
            if first is None:
                raise errors.UnavailableError("the server ended the stream of a run before it answered")
        except BaseException:
            talk.abandon()
            raise
        if not self.run_id:
            self.run_id = first.accepted.run.run_id
            self._breaks = Reconnection(self._rpc, self.run_id, max_backoff_s=self._max_backoff_s)
        assert self._breaks is not None, "it has a run"
        self._breaks.heard()
        with self._lock:
            self._opening.run_id = self.run_id  # instead of what starts it
            self._sent.clear()
            self._counted = 0
            self._talk = talk
            for addition in self._additions.values():
                talk.send(workflow_pb2.OpenRunRequest(additions=[addition]))
            if self._is_closed:
                talk.send(workflow_pb2.OpenRunRequest(close=True))

    async def step(self) -> bool:
        """Take the next message; return whether another one may come. Raises RequestError, LimitReachedError."""
        assert self._breaks is not None, "it was opened"
        if self.ended is not None:
            return False
        try:
            if (talk := self._talk) is None:
                await self.open()
                return True
            response = await talk.read()
        except errors.RequestError as error:
            self.abandon()
            await self._breaks.wait(error)
            return True
        except LimitReachedError:
            # What ended the wait ended the stream, and the run is to be held all the same.
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
        self._breaks.heard()
        with self._lock:
            self._take(response)
        return self.ended is None

    def abandon(self) -> None:
        """Hold the run no more, unless it is opened again. May be called from any thread, and by a finalizer."""
        with self._lock:
            talk, self._talk = self._talk, None
        if talk is not None:
            talk.abandon()

    def _take(self, response: workflow_pb2.OpenRunResponse) -> None:
        for result in response.additions:
            if self._additions.pop(result.request_id, None) is not None:
                self.results[result.request_id] = result
        while self._counted < response.received_answers:
            self._counted += 1
            self._answers.pop(self._sent.popleft(), None)
        for question in response.questions:
            self._take_question(question)
        for question_id in response.withdrawn_question_ids:
            self._asked.discard(question_id)
            self.on_withdrawal(question_id)
        for event in response.events:
            self._keep(event)
        self._opening.after_sequence = max(self._opening.after_sequence, response.sequence)
        if response.HasField("ended"):
            self.ended = response.ended
            self.abandon()
        elif response.HasField("stopped"):
            self.abandon()
            raise errors.from_refusal(response.stopped)

    def _take_question(self, question: workflow_pb2.Question) -> None:
        if (given := self._answers.get(question.question_id)) is not None:
            self._send_answer(given)  # it was lost with the stream
        elif question.question_id not in self._asked:
            self._asked.add(question.question_id)
            self.on_question(question)

    def _keep(self, event: run_pb2.RunEvent) -> None:
        task_id = getattr(event, event.WhichOneof("event") or "").task_id
        self._ends[task_id] = event
        self._kept.append(task_id)
        self._kept_bytes += event.ByteSize()
        while self._kept_bytes > KEPT_BYTES:
            oldest = self._kept.popleft()
            dropped, self._ends[oldest] = self._ends[oldest], None
            self._kept_bytes -= dropped.ByteSize() if dropped is not None else 0

    # What is said.

    def add(self, request: workflow_pb2.AddTasksRequest) -> None:
        """Add tasks; `results` has what became of that once it is known. For any thread."""
        with self._lock:
            self._additions[request.request_id] = request
            if self._talk is not None:
                self._talk.send(workflow_pb2.OpenRunRequest(additions=[request]))

    def answer(self, answer: workflow_pb2.QuestionAnswer) -> bool:
        """Answer a question; return whether it still needs an answer, as far as is known here. For any thread."""
        with self._lock:
            if answer.question_id not in self._asked:
                return False
            self._asked.discard(answer.question_id)
            self._answers[answer.question_id] = answer
            self._send_answer(answer)
            return True

    def _send_answer(self, answer: workflow_pb2.QuestionAnswer) -> None:
        if self._talk is not None:
            self._sent.append(answer.question_id)
            self._talk.send(workflow_pb2.OpenRunRequest(answers=[answer]))

    def close(self) -> None:
        """Say that no more tasks will come. For any thread."""
        with self._lock:
            if not self._is_closed and self._talk is not None:
                self._talk.send(workflow_pb2.OpenRunRequest(close=True))
            self._is_closed = True

    # What is known.

    def has_ended(self, task_id: str) -> bool:
        """Whether a task is known to have ended."""
        return task_id in self._ends

    def has_any_ended(self, task_ids: Iterable[str]) -> bool:
        """Whether one of some tasks is known to have ended."""
        return any(task_id in self._ends for task_id in task_ids)

    def end_of(self, task_id: str) -> run_pb2.TaskRun | None:
        """Return a task that has ended, where all that there is to know of it is known here."""
        event = self._ends.get(task_id)
        if event is None:
            return None
        kind = event.WhichOneof("event") or ""
        body = getattr(event, kind)
        if kind == "task_succeeded" and not body.outputs:
            return None  # of a mapped task its items have the outputs
        return made(
            run_pb2.TaskRun,
            run_id=self.run_id,
            task_id=task_id,
            display_name=body.display_name,
            state=STATES[kind],
            outputs=body.outputs if kind == "task_succeeded" else None,
            failure=None if kind == "task_succeeded" or not body.HasField("failure") else body.failure,
        )
