"""Owns the answers of one open run until the server has them. Rule: each question is answered once.

The server acknowledges answers by their number on the present stream. An answer that a broken stream lost is sent again
when the server repeats its question.
"""

from collections import deque

from lattice.v1 import workflow_pb2


class Answers:
    """The questions without an answer, and the answers without an acknowledgement. The caller holds a lock."""

    def __init__(self) -> None:
        self._unanswered: set[str] = set()
        self._unacknowledged: dict[str, workflow_pb2.QuestionAnswer] = {}
        # The ids of the answers sent on the present stream, in order, without those acknowledged.
        self._sent: deque[str] = deque()
        self._acknowledged = 0

    def restart(self) -> None:
        """Begin to count for a new stream."""
        self._sent.clear()
        self._acknowledged = 0

    def acknowledge(self, received: int) -> None:
        """Drop the answers that the server received; it counts those of the present stream."""
        while self._acknowledged < received:
            self._acknowledged += 1
            self._unacknowledged.pop(self._sent.popleft(), None)

    def given(self, question_id: str) -> workflow_pb2.QuestionAnswer | None:
        """Return the answer to a question that was answered already."""
        return self._unacknowledged.get(question_id)

    def ask(self, question_id: str) -> bool:
        """Add a question; return whether it is new."""
        if question_id in self._unanswered:
            return False
        self._unanswered.add(question_id)
        return True

    def withdraw(self, question_id: str) -> None:
        """Drop a question that needs no answer any more."""
        self._unanswered.discard(question_id)

    def answer(self, answer: workflow_pb2.QuestionAnswer) -> bool:
        """Add the answer to a question; return whether the question still needed one."""
        if answer.question_id not in self._unanswered:
            return False
        self._unanswered.discard(answer.question_id)
        self._unacknowledged[answer.question_id] = answer
        return True

    def sent(self, answer: workflow_pb2.QuestionAnswer) -> None:
        """Record that an answer was sent on the present stream."""
        self._sent.append(answer.question_id)
