"""Owns the questions and withdrawals to send on one caller's stream of an open run.

Rule: the stream reads events from the run's log, so none are queued here.
"""

import asyncio

from lattice_server.core.errors import LatticeError
from lattice_server.core.messages import QuestionAsked


class CallerStream:
    """One stream of the caller of an open run; `news` is set when there is something to send on it.

    `taken_over` is set when a newer stream of the run replaces this one.
    """

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self.news.set()  # A stream that takes a run over may find events that were never sent.
        self.taken_over: LatticeError | None = None
        self._questions: dict[str, QuestionAsked] = {}
        self._withdrawn: list[str] = []

    def ask(self, question: QuestionAsked) -> None:
        """Queue a question."""
        self._questions[question.question_id] = question
        self.news.set()

    def withdraw(self, question_id: str) -> None:
        """Queue the withdrawal of a question; a question that was not sent yet is dropped instead."""
        if self._questions.pop(question_id, None) is None:
            self._withdrawn.append(question_id)
            self.news.set()

    def take(self) -> tuple[list[QuestionAsked], list[str]]:
        """Return the queued questions and withdrawals, which count as sent."""
        asked, self._questions = list(self._questions.values()), {}
        withdrawn, self._withdrawn = self._withdrawn, []
        return asked, withdrawn
