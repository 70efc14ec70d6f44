"""The questions that an invocation asks the caller that holds its run, and their answers.

Rule: a question gets an answer, or an error when the invocation is over.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any

from lattice_worker.runner.encoding.values import decode_value
from lattice_worker.runner.frames import Channel

OVER = "the attempt is over: nothing can be asked any more"
FORKED = "there is no task running here; this works inside tasks, and not in processes they fork"


class QuestionError(Exception):
    """A question got no answer: no caller holds the run, or the question cannot be put to it."""

    __module__ = "lattice_worker.context"


class AnswerError(QuestionError):
    """The caller answered that something went wrong; `type` names its error."""

    __module__ = "lattice_worker.context"

    def __init__(self, message: str, type: str = "", kind: str = "") -> None:
        super().__init__(message, type)
        self.type, self.kind = type, kind

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{self.type}: {message}" if self.type else message


class Questions:
    """The questions of one invocation that wait for an answer; for any thread."""

    def __init__(self, channel: Channel, name: str) -> None:
        self._channel = channel
        self._name = name
        self._numbers = count(1)
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[Any]] = {}
        self._is_over = False
        # Waits for signals that no coroutine waits for any more, oldest first, by name; see `awaited`.
        self.given_up: dict[str, list[Future[Any]]] = {}

    def ask(self, item: int, name: str, payload: dict[str, Any], blobs: Sequence[bytes]) -> "Future[Any]":
        """Ask; the future has the encoded answer or a QuestionError. Raises that when the invocation is over."""
        header = {"kind": "ask", "id": self._name, "item": item, "name": name, "payload": payload}
        return self._send(header, blobs)

    def wait(self, task_id: str) -> "Future[Any]":
        """Wait for a called task; the future has its encoded outputs, an AnswerError or a QuestionError."""
        return self._send({"kind": "await", "id": self._name, "item": 0, "task": task_id}, ())

    def wait_for(self, name: str, timeout_s: float | None) -> "Future[Any]":
        """Wait for a signal; the future has its encoded value, an AnswerError or a QuestionError."""
        header = {"kind": "await", "id": self._name, "item": 0, "signal": name, "timeout": timeout_s}
        return self._send(header, ())

    def _send(self, header: dict[str, Any], blobs: Sequence[bytes]) -> "Future[Any]":
        self.check_owner()
        answer: Future[Any] = Future()
        with self._lock:
            if self._is_over:
                raise QuestionError(OVER)
            number = next(self._numbers)
            self._waiting[number] = answer
            self._channel.listen()
        self._channel.send(header | {"number": number}, blobs)
        return answer

    def take(self, header: dict[str, Any], blobs: list[bytes]) -> None:
        """Take the answer of a question. Called by a thread that runs no code of the invocation."""
        with self._lock:
            waiting = self._waiting.pop(header["number"], None)
        if waiting is None or not waiting.set_running_or_notify_cancel():
            return
        if "unanswered" in header:
            waiting.set_exception(QuestionError(header["unanswered"]))
        elif "failure" in header:
            failure = header["failure"]
            waiting.set_exception(AnswerError(failure["message"], failure["type"], failure.get("kind", "")))
        elif "outputs" in header:
            waiting.set_result((header["outputs"], blobs))
        else:
            waiting.set_result((header["value"]["type"], blobs[header["value"]["blob"]]))

    def check_owner(self) -> None:
        """Raise RuntimeError in a process that the invocation has forked: the answer would arrive in its parent."""
        if self._channel.owner != os.getpid():
            raise RuntimeError(FORKED)

    def close(self) -> None:
        """End the invocation: what still waits gets QuestionError."""
        with self._lock:
            self._is_over = True
            waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            if answer.set_running_or_notify_cancel():
                answer.set_exception(QuestionError(OVER))


def decoded(answer: tuple[str, bytes]) -> Any:
    """Return the value of an answer."""
    return decode_value(*answer)
