"""Called tasks: tasks that an invocation added to its run and waits for."""

import asyncio
from collections.abc import Generator
from concurrent.futures import Future
from typing import Any

from lattice_worker.runner.encoding.deferred import Deferred
from lattice_worker.runner.invocation.asking import AnswerError, Questions
from lattice_worker.runner.invocation.binding import bind_all


class CallError(Exception):
    """A called task did not succeed; `kind` and `type` say why, such as USER_ERROR and ValueError."""

    __module__ = "lattice_worker.context"

    def __init__(self, message: str, task_id: str = "", kind: str = "", type: str = "") -> None:
        super().__init__(message, task_id, kind, type)
        self.task_id, self.kind, self.type = task_id, kind, type

    def __str__(self) -> str:
        if self.type == f"{self.__module__}.{type(self).__name__}":
            # It has the text of the error of the task that began it, whose id names all tasks in between.
            return str(self.args[0])
        error = f"{self.type}: {self.args[0]}" if self.type else str(self.args[0])
        return f"task {self.task_id!r} failed ({self.kind}): {error}"


class Call(Deferred):
    """A called task. It runs at once; `await call`, or `call.result()`, waits for its value.

    The value is the task's only output, or a dict of its outputs by name.
    """

    __slots__ = ("__weakref__", "_output_names", "_questions", "task_id")

    def __init__(self, questions: Questions, task_id: str, output_names: tuple[str, ...]) -> None:
        self.task_id = task_id
        self._questions = questions
        self._output_names = output_names

    def result(self) -> Any:
        """Wait for the value, in this thread. In a coroutine use `await`.

        Raises:
            CallError: the task failed, or was cancelled.
            QuestionError: the attempt is over.
        """
        return self._value(self._questions.wait(self.task_id))

    def __await__(self) -> Generator[Any, None, Any]:
        return self.waited().__await__()

    async def waited(self) -> Any:
        """Wait for the value, without blocking other coroutines. Raises as `result`."""
        answer = self._questions.wait(self.task_id)
        await asyncio.wait([asyncio.wrap_future(answer)])
        return self._value(answer)

    def _value(self, answer: "Future[Any]") -> Any:
        try:
            outputs, blobs = answer.result()
        except AnswerError as error:
            raise CallError(str(error.args[0]), self.task_id, error.kind, error.type) from None
        values = bind_all(outputs, blobs)
        return values[self._output_names[0]] if (*values,) == self._output_names[:1] == self._output_names else values

    def _advice(self) -> str:
        return f"{self!r} is a call and not its value: `await` it in a coroutine, or use its result() in a function"

    def __repr__(self) -> str:
        return f"Call(task_id={self.task_id!r})"
