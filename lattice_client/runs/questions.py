"""Owns the questions that tasks ask the caller of an open run. Rule: the thread that answers decodes and encodes."""

import traceback
from collections.abc import Callable
from typing import Any

from lattice.v1 import errors_pb2, payload_pb2, workflow_pb2

from lattice_client import errors
from lattice_client.convert import payloads
from lattice_client.runs.decoding import Fetched, decoded

OnQuestion = Callable[["Question"], Any]
MAX_TEXT = 64 * 1024


class Question:
    """A question of an attempt, which waits for the answer. See `context.ask`."""

    def __init__(
        self,
        message: workflow_pb2.Question,
        limit_bytes: int,
        send: Callable[[workflow_pb2.QuestionAnswer], bool],
        trust_pickles: bool = False,
    ) -> None:
        self.question_id = message.question_id
        self.run_id = message.run_id
        self.task_id = message.task_id
        self.attempt = message.attempt
        self.name = message.name
        self.is_withdrawn = False
        self._message = message
        self._limit_bytes = limit_bytes
        self._trust_pickles = trust_pickles
        self._send = send
        self._value: tuple[Any] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} of task {self.task_id!r}, attempt {self.attempt}>"

    @property
    def payload(self) -> Any:
        """The value that the task sent with the question, decoded at its first use.

        Raises UntrustedPayloadError, DecodeError.
        """
        if self._value is None:
            message = self._message.payload
            data = message.json.encode() if message.WhichOneof("content") == "json" else message.data
            source = f"question {self.name!r} of task {self.task_id!r}"
            self._value = (decoded(Fetched.of(message, data, source, self._trust_pickles)),)
        return self._value[0]

    def answer(self, value: Any = None) -> bool:
        """Answer with a value; return False when the question needs no answer any more.

        Raises TaskDefinitionError when the value cannot be pickled, or is larger than the server's limit; the question
        can then be answered with another value.
        """
        payload = inline_payload(value, f"the answer to {self!r}", self._limit_bytes)
        return self._send(workflow_pb2.QuestionAnswer(question_id=self.question_id, payload=payload))

    def fail(self, error: BaseException | str) -> bool:
        """Answer with an error, of which the task gets the type and the text. Returns as `answer`."""
        failure = errors_pb2.Failure(kind=errors_pb2.FAILURE_KIND_USER_ERROR)
        if isinstance(error, str):
            failure.message = _sendable(error)
        else:
            failure.type = _sendable(type(error).__qualname__)
            failure.message = _sendable(_text_of(error))
        return self._send(workflow_pb2.QuestionAnswer(question_id=self.question_id, failure=failure))


def inline_payload(value: Any, what: str, limit_bytes: int) -> payload_pb2.Payload:
    """Return a value as an inline payload. Raises TaskDefinitionError when it cannot be pickled, or is too large."""
    try:
        media_type, data = payloads.encode(value)
    except Exception as error:
        text = f"{what} cannot be pickled: {type(error).__name__}: {error}"
        raise errors.TaskDefinitionError(text) from error
    payload = payloads.inline(media_type, data)
    if (size := payload.ByteSize()) > limit_bytes:
        text = f"{what} has {size} bytes, and the limit is {limit_bytes}"
        raise errors.TaskDefinitionError(f"{text}: give the task a larger value as an input")
    return payload


def _text_of(error: BaseException) -> str:
    try:
        return str(error) or traceback.format_exception_only(error)[-1].strip()
    except Exception:  # the class is the user's
        return "its text could not be read"


def _sendable(text: str) -> str:
    return text[:MAX_TEXT].encode(errors="backslashreplace").decode()
