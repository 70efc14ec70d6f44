"""Owns what attempts and the caller that holds their run open say to each other. Rule: one answer for one question."""

from dataclasses import dataclass

from lattice_server.core.model import Failure, Payload

# For people whose task gets no answer.
NOT_OPEN = "no caller can be asked: the run was not started by OpenRun, or `open_run`, which holds it open"
NOT_HELD = "no caller answers any more: the one that held the run open has gone and did not come back"
TOO_MANY = "more than {} questions of the run wait for an answer"


@dataclass(frozen=True, slots=True)
class AttemptAsked:
    """An attempt of a lease asks a question; `number` names it within its lease."""

    session_id: str
    lease_id: str
    item: int
    number: int
    name: str
    payload: Payload


@dataclass(frozen=True, slots=True)
class QuestionAsked:
    """An attempt asks the caller that holds its run. The answer goes to a session, a lease and a number."""

    run_id: str
    task_id: str
    attempt: int
    session_id: str
    lease_id: str
    number: int
    name: str
    payload: Payload

    @property
    def question_id(self) -> str:
        """Its name in its run: leases have unique ones."""
        return f"{self.lease_id}/{self.number}"


@dataclass(frozen=True, slots=True)
class AnswerQuestion:
    """Tell a worker the answer of a question: a value, what went wrong, or why there is none, for people.

    `sequence` rises from 1 in its session, once it is known.
    """

    session_id: str
    lease_id: str
    number: int
    answer: Payload | Failure | str
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class AskHolder:
    """Put a question to the stream that holds a run."""

    question: QuestionAsked


@dataclass(frozen=True, slots=True)
class WithdrawQuestion:
    """Tell the stream that holds a run that a question needs no answer any more."""

    question_id: str


def answer_to(question: QuestionAsked, answer: Payload | Failure | str) -> AnswerQuestion:
    """Return the answer of a question."""
    return AnswerQuestion(question.session_id, question.lease_id, question.number, answer)


def question_of(asked: AttemptAsked, run_id: str, task_id: str, attempt: int) -> QuestionAsked:
    """Return the question of an attempt."""
    where = (asked.session_id, asked.lease_id, asked.number)
    return QuestionAsked(run_id, task_id, attempt, *where, asked.name, asked.payload)
