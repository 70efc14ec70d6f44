"""Owns what a caller is asked by the tasks of a run that it holds open. Rule: a question is answered once.

A value is decoded, and an answer encoded, in the thread of whoever answers.
"""

import inspect
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from lattice.v1 import errors_pb2, workflow_pb2

from lattice_client import errors
from lattice_client.convert import payloads
from lattice_client.runs.decoding import Fetched, opened

OnQuestion = Callable[["Question"], Any]
MAX_TEXT = 64 * 1024


class Question:
    """What an attempt asks, and waits to be answered. See `context.ask`."""

    def __init__(
        self, message: workflow_pb2.Question, limit_bytes: int, send: Callable[[workflow_pb2.QuestionAnswer], bool]
    ) -> None:
        self.question_id = message.question_id
        self.run_id = message.run_id
        self.task_id = message.task_id
        self.attempt = message.attempt
        self.name = message.name
        self.is_withdrawn = False
        self._message = message
        self._limit_bytes = limit_bytes
        self._send = send
        self._value: tuple[Any] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} of task {self.task_id!r}, attempt {self.attempt}>"

    @property
    def payload(self) -> Any:
        """What is asked about, decoded when it is first looked at. Raises DecodeError."""
        if self._value is None:
            message = self._message.payload
            data = message.json.encode() if message.WhichOneof("content") == "json" else message.data
            self._value = (opened(Fetched(message.media_type, data)),)
        return self._value[0]

    def answer(self, value: Any = None) -> bool:
        """Answer with a value; return False when the question needs no answer any more.

        Raises TaskDefinitionError when the value cannot be pickled, or is larger than the server takes; the question
        can be answered again then.
        """
        try:
            media_type, data = payloads.encode(value)
        except Exception as error:
            text = f"the answer to {self!r} cannot be pickled: {type(error).__name__}: {error}"
            raise errors.TaskDefinitionError(text) from error
        message = workflow_pb2.QuestionAnswer(question_id=self.question_id)
        message.payload.CopyFrom(payloads.inline(media_type, data))
        if (size := message.payload.ByteSize()) > self._limit_bytes:
            text = f"the answer to {self!r} takes {size} bytes, and an answer may have {self._limit_bytes}"
            raise errors.TaskDefinitionError(f"{text}: give what is larger to the task as an input")
        return self._send(message)

    def fail(self, error: BaseException | str) -> bool:
        """Answer with an error, of which the task is told the type and the text. Returns as `answer`."""
        failure = errors_pb2.Failure(kind=errors_pb2.FAILURE_KIND_USER_ERROR)
        if isinstance(error, str):
            failure.message = _sendable(error)
        else:
            failure.type = _sendable(type(error).__qualname__)
            failure.message = _sendable(_text_of(error))
        return self._send(workflow_pb2.QuestionAnswer(question_id=self.question_id, failure=failure))


def serve(question: Question, handler: OnQuestion) -> Awaitable[Any] | None:
    """Answer a question with what a handler returns or raises; what is left to be awaited is returned.

    KeyboardInterrupt and SystemExit go to the caller, after the question was answered with them.
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


async def serve_awaited(question: Question, found: Awaitable[Any]) -> None:
    """Answer a question with what an awaitable gives or raises."""
    try:
        question.answer(await found)
    except Exception as error:
        question.fail(error)
    except BaseException as error:
        question.fail(error)
        raise


def _text_of(error: BaseException) -> str:
    try:
        return str(error) or traceback.format_exception_only(error)[-1].strip()
    except Exception:  # the class is the user's
        return "its text cannot be had"


def _sendable(text: str) -> str:
    return text[:MAX_TEXT].encode(errors="backslashreplace").decode()
