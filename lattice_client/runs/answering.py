"""Owns the questions of one open run until they are answered, and the calls of their handler."""

import asyncio
import inspect
from collections import deque
from collections.abc import Awaitable
from typing import Any

from lattice.v1 import workflow_pb2

from lattice_client import background
from lattice_client.runs.open_run_stream import OpenRunStream
from lattice_client.runs.questions import OnQuestion, Question


class Questions:
    """The unanswered questions of one run, in the order in which they arrived."""

    def __init__(self, stream: OpenRunStream, limit_bytes: int, trust_pickles: bool = False) -> None:
        self._stream = stream
        self._limit_bytes = limit_bytes
        self._trust_pickles = trust_pickles
        self._unanswered: dict[str, Question] = {}
        self._untaken: deque[Question] = deque()
        stream.on_question, stream.on_withdrawal = self._add, self._withdraw

    def _add(self, message: workflow_pb2.Question) -> None:
        question = Question(message, self._limit_bytes, self._answer, self._trust_pickles)
        self._unanswered[question.question_id] = question
        self._untaken.append(question)

    def _withdraw(self, question_id: str) -> None:
        if (question := self._unanswered.pop(question_id, None)) is not None:
            question.is_withdrawn = True

    def _answer(self, answer: workflow_pb2.QuestionAnswer) -> bool:
        self._unanswered.pop(answer.question_id, None)
        return self._stream.answer(answer)

    @property
    def has_next(self) -> bool:
        """Whether a question was not taken yet."""
        return bool(self._untaken)

    def take(self) -> Question | None:
        """Return the oldest question that was not taken yet and still needs an answer."""
        while self._untaken:
            try:
                question = self._untaken.popleft()
            except IndexError:  # another thread took it
                return None
            if not question.is_withdrawn:
                return question
        return None


class AnsweringTasks:
    """Answers the questions of one run by a handler, each in an asyncio task of its own."""

    def __init__(self, questions: Questions, handler: OnQuestion) -> None:
        self._questions = questions
        self._handler = handler
        self._tasks: dict[Question, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Start to answer the questions that were not taken yet; cancel the answers to withdrawn questions."""
        while (question := self._questions.take()) is not None:
            # The error of a handler is the answer to its question.
            self._tasks[question] = background.start(self._answer(question), background.only_log)
        for question, task in list(self._tasks.items()):
            if task.done():
                del self._tasks[question]
            elif question.is_withdrawn:
                task.cancel()

    async def _answer(self, question: Question) -> None:
        awaitable = answer_by(self._handler, question)
        if awaitable is not None:
            await _answer_awaited(question, awaitable)


def answer_by(handler: OnQuestion, question: Question) -> Awaitable[Any] | None:
    """Answer a question with the result or the exception of a handler; return an awaitable result instead.

    KeyboardInterrupt and SystemExit are sent as the answer and raised again.
    """
    try:
        found = handler(question)
        if inspect.isawaitable(found):
            return found
        question.answer(found)
    except Exception as error:
        question.fail(error)
    except BaseException as error:
        question.fail(error)
        raise
    return None


async def _answer_awaited(question: Question, awaitable: Awaitable[Any]) -> None:
    try:
        question.answer(await awaitable)
    except Exception as error:
        question.fail(error)
    except BaseException as error:
        question.fail(error)
        raise
