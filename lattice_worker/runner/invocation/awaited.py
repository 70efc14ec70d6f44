"""Awaited signals: values that a person, or a program, sends to the run of an invocation that waits for them.

Rule: each value of a signal is returned once. A wait that a coroutine gives up stays open, and the next wait for the
same signal takes it over.
"""

import asyncio
from concurrent.futures import Future
from typing import Any

from lattice_worker.runner.invocation.asking import AnswerError, QuestionError, Questions, decoded

MAX_NAME_LENGTH = 128
MAX_TIMEOUT_S = 1e9  # 30 years.
# The kind of the failure that ends a wait.
TIMEOUT = "TIMEOUT"


def wait(output: Any, name: str, timeout: float | None) -> Any:
    """Wait for a signal in this thread; see `context.wait_for`. `output` is that of the invocation."""
    questions = _checked(output, name, timeout)
    if (answer := _taken_over(questions, name)) is None:
        return _value(name, questions.wait_for(name, timeout))
    try:
        answer.result(timeout)
    except TimeoutError:
        _give_up(questions, name, answer)
        raise TimeoutError(_late(name)) from None
    except AnswerError:
        pass
    return _value(name, answer)


async def wait_async(output: Any, name: str, timeout: float | None) -> Any:
    """As `wait`, without blocking other coroutines."""
    questions, limit = _checked(output, name, timeout), None
    if (answer := _taken_over(questions, name)) is None:
        answer = questions.wait_for(name, timeout)
    else:
        limit = timeout
    try:
        await asyncio.wait([asyncio.wrap_future(answer)], timeout=limit)
    except asyncio.CancelledError:
        _give_up(questions, name, answer)
        raise
    if not answer.done():
        _give_up(questions, name, answer)
        raise TimeoutError(_late(name))
    return _value(name, answer)


def _checked(output: Any, name: object, timeout: object) -> Questions:
    """Return the questions of an invocation that may wait with these arguments. Raises QuestionError, RuntimeError."""
    questions: Questions = output.questions
    questions.check_owner()
    if not output.header.get("takes_signals", False):
        raise QuestionError("wait_for: the server is of a version that takes no signals")
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME_LENGTH:
        raise QuestionError(f"the name of a signal must be a text of 1 to {MAX_NAME_LENGTH} characters, not {name!r}")
    if timeout is not None and not (isinstance(timeout, int | float) and 0 <= timeout <= MAX_TIMEOUT_S):
        raise QuestionError(f"timeout must be a number of seconds from 0 to {MAX_TIMEOUT_S:.0f}, not {timeout!r}")
    return questions


def _taken_over(questions: Questions, name: str) -> "Future[Any] | None":
    """Return the oldest wait that was given up, unless its time was up."""
    left = questions.given_up.get(name, [])
    while left:
        answer = left.pop(0)
        error = answer.exception() if answer.done() else None
        if not (isinstance(error, AnswerError) and error.kind == TIMEOUT):
            return answer
    return None


def _give_up(questions: Questions, name: str, answer: "Future[Any]") -> None:
    questions.given_up.setdefault(name, []).append(answer)


def _value(name: str, answer: "Future[Any]") -> Any:
    try:
        return decoded(answer.result())
    except AnswerError as error:
        if error.kind == TIMEOUT:
            raise TimeoutError(_late(name)) from None
        raise


def _late(name: str) -> str:
    return f"signal {name!r} was not sent in time"
