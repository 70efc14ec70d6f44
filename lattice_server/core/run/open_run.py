"""Owns the stream that holds an open run, and the questions of the run's attempts to its caller.

Rule: a question gets one answer, or is withdrawn with the attempt that asked it.
"""

from collections.abc import Mapping, Sequence

from lattice_server.core.messages import (
    AnswerQuestion,
    AskHolder,
    QuestionAsked,
    RunFinished,
    TaskCancelled,
    TaskFailed,
    TaskRetrying,
    TaskSucceeded,
    WithdrawQuestion,
)
from lattice_server.core.model import Failure, Payload
from lattice_server.core.run.run import Effect, Run
from lattice_server.core.states import TASK_TERMINAL

MAX_QUESTIONS = 1000
NOT_OPEN = "no caller can be asked: the run was not started by OpenRun, or `open_run`, which holds it open"
NOT_HELD = "no caller answers any more: the one that held the run open has gone and did not come back"
TOO_MANY = "more than {} questions of the run wait for an answer"
# The events by which an attempt ends.
ATTEMPT_ENDS = TaskSucceeded | TaskFailed | TaskRetrying | TaskCancelled

HolderEffect = AskHolder | WithdrawQuestion | AnswerQuestion


def answer_to(question: QuestionAsked, answer: Payload | Failure | str) -> AnswerQuestion:
    """Return the message with the answer to a question; a sentence says why there is none."""
    return AnswerQuestion(question.session_id, question.lease_id, question.number, answer)


class OpenRun:
    """The machine of the caller of one open run, beside that of the run; the orchestrator's thread owns it.

    The newest stream holds the run. After `grace_s` seconds without a stream the run is cancelled, unless it was closed
    before, and its questions get no answer.
    """

    def __init__(self, run: Run, grace_s: float, now: float, max_questions: int = MAX_QUESTIONS) -> None:
        self._run = run
        self._grace_s = grace_s
        self._max_questions = max_questions
        self._left_at: float | None = now
        self._is_held = False
        self._questions: dict[str, QuestionAsked] = {}
        self.questions: Mapping[str, QuestionAsked] = self._questions

    def hold(self) -> list[HolderEffect]:
        """Note that a stream holds the run; questions without an answer are sent to it."""
        self._left_at, self._is_held = None, not self._run.is_terminal
        return [AskHolder(question) for question in self._questions.values()]

    def leave(self, now: float) -> None:
        """Note that the stream broke, or that its caller closed its side of it."""
        if self._is_held:
            self._is_held = False
            self._left_at = None if self._run.is_terminal else now

    def next_deadline(self) -> float | None:
        """Return when `tick` is due next, or None."""
        return None if self._left_at is None else self._left_at + self._grace_s

    def tick(self, now: float) -> list[Effect | HolderEffect]:
        """Cancel the run if no stream has held it for too long."""
        deadline = self.next_deadline()
        if deadline is None or now < deadline:
            return []
        self._left_at = None
        effects: list[Effect | HolderEffect] = [answer_to(asked, NOT_HELD) for asked in self._questions.values()]
        self._questions.clear()
        if self._run.is_open:
            reason = f"the caller that held it open did not come back within {self._grace_s:g} s"
            effects += self._run.cancel(reason, now)
        return effects

    def ask(self, question: QuestionAsked) -> list[HolderEffect]:
        """Take a question of a running attempt."""
        record = self._run.tasks[question.task_id]
        if question.question_id in self._questions or record.state in TASK_TERMINAL:
            return []
        if not self._is_held and self._left_at is None:
            return [answer_to(question, NOT_HELD)]
        if len(self._questions) >= self._max_questions:
            return [answer_to(question, TOO_MANY.format(self._max_questions))]
        self._questions[question.question_id] = question
        return [AskHolder(question)] if self._is_held else []

    def answer(self, question_id: str, answer: Payload | Failure | str) -> AnswerQuestion | None:
        """Take an answer; return None when there is no such question, or no more."""
        question = self._questions.pop(question_id, None)
        return None if question is None else answer_to(question, answer)

    def withdraw(self, effects: Sequence[object]) -> list[HolderEffect]:
        """Withdraw the questions of the attempts that end with these effects."""
        if not self._questions:
            return []
        over = {effect.task_id for effect in effects if isinstance(effect, ATTEMPT_ENDS)}
        has_ended = any(isinstance(effect, RunFinished) for effect in effects)
        gone = [name for name, question in self._questions.items() if has_ended or question.task_id in over]
        for name in gone:
            del self._questions[name]
        return [WithdrawQuestion(name) for name in gone]

    def check(self) -> None:
        """Assert every invariant; tests call it after each step."""
        assert not (self._is_held and self._left_at is not None), "a run is held and has no stream"
        assert not self._questions or self._is_held or self._left_at is not None, "a question without a caller waits"
        assert len(self._questions) <= self._max_questions
        for question in self._questions.values():
            assert not self._run.is_terminal, "a question outlived its run"
            assert self._run.tasks[question.task_id].is_with_scheduler, "a question outlived its task"
