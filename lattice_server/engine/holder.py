"""Owns what is to be told on one stream that holds a run. Rule: events are not kept here; the run's log has them."""

import asyncio

from lattice_server.core.errors import LatticeError
from lattice_server.core.messages import QuestionAsked


class Holder:
    """One stream that holds a run: what is to be told on it besides events, and `news`, set when anything is.

    `taken_over` is set when another stream holds the run.
    """

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self.news.set()  # Of a run that is taken over there may be something to tell.
        self.taken_over: LatticeError | None = None
        self._questions: dict[str, QuestionAsked] = {}
        self._withdrawn: list[str] = []

    def ask(self, question: QuestionAsked) -> None:
        """Queue a question."""
        self._questions[question.question_id] = question
        self.news.set()

    def withdraw(self, question_id: str) -> None:
        """Queue the withdrawal of a question; one that was not sent yet is not sent."""
        if self._questions.pop(question_id, None) is None:
            self._withdrawn.append(question_id)
            self.news.set()

    def take(self) -> tuple[list[QuestionAsked], list[str]]:
        """Return the questions and the withdrawals that are queued, which count as sent."""
        asked, self._questions = list(self._questions.values()), {}
        withdrawn, self._withdrawn = self._withdrawn, []
        return asked, withdrawn
