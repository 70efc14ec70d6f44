"""Owns the messages between attempts and the caller that holds their run open. Rule: a question gets one answer."""

from lattice_server.core.frozen import frozen
from lattice_server.core.messages.calls import CallResult
from lattice_server.core.messages.tasks import AttemptMessage
from lattice_server.core.messages.workers import AttemptReport, LeaseMessage
from lattice_server.core.model import Payload


@frozen
class AttemptAsked(AttemptReport):
    """An attempt asks a question; `number` identifies it within its lease."""

    number: int
    name: str
    payload: Payload


@frozen
class QuestionAsked(AttemptMessage):
    """An attempt asks the caller that holds its run. The answer goes to a session, a lease and a number."""

    session_id: str
    lease_id: str
    number: int
    name: str
    payload: Payload

    @property
    def question_id(self) -> str:
        """Its id within its run. Lease ids are unique."""
        return f"{self.lease_id}/{self.number}"


@frozen
class AnswerQuestion(LeaseMessage):
    """Send a worker the answer to a question, a call or a wait for a signal: a value, a failure, or why there is none.

    `sequence` rises from 1 within a session; it is zero until the message is sent.
    """

    number: int
    answer: CallResult
    sequence: int = 0


@frozen
class AskHolder:
    """Send a question to the stream that holds a run open."""

    question: QuestionAsked


@frozen
class WithdrawQuestion:
    """Tell the stream that holds a run open that a question needs no answer any more."""

    question_id: str
