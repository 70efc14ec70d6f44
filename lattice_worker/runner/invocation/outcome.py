"""The answer of an invocation: the outputs that its function returned, or the failure that it raised.

Rule: an invocation has an answer, whatever its code returns or raises.
"""

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Mapping, Set
from typing import Any, NoReturn, Self

from lattice_worker.runner.encoding.artifacts import Encoder
from lattice_worker.runner.encoding.text import utf8
from lattice_worker.runner.encoding.values import PayloadError
from lattice_worker.runner.frames import MAX_FRAME_BYTES, Channel
from lattice_worker.runner.invocation.failures import failure_of
from lattice_worker.runner.invocation.output import flush_streams

MAX_ANSWER_BYTES = MAX_FRAME_BYTES // 2
# The name of a class, past its metaclass, which may be user code.
_NAME: Callable[[type], str] = type.__dict__["__name__"].__get__

Answer = tuple[dict[str, Any], list[bytes]]


class Outcome:
    """The answer of an invocation, made from the value its function returns or the error its `with` block raises."""

    def __init__(
        self, header: dict[str, Any], return_style: str, channel: Channel, explain: Callable[[BaseException], None]
    ) -> None:
        self._header = header
        self._return_style = return_style
        self._explain = explain
        self._channel = channel
        self._encoder = Encoder(header)
        self._started = time.perf_counter()
        self._answer: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> bool:
        if os.getpid() != self._channel.owner:
            end_child(error)  # The task forked, and both processes came back.
        if error is not None:  # SystemExit too: user code must not end the runner by raising it.
            self.fail(error)
        return True

    def take(self, value: Any) -> None:
        """Encode the value that the function returned."""
        self._answer = self._batch(value) if self._header["batched"] else self._member(value)

    def fail(self, error: BaseException) -> None:
        """Describe the error that the function raised, or that encoding its value raised. Never raises."""
        self._encoder.take_back()
        self._answer = {"failure": self._describe(error)}

    def _describe(self, error: BaseException) -> dict[str, Any]:
        # The error's own methods are called, and may never return: the agent gives them a second.
        kind = utf8(_NAME(type(error)))
        self._channel.send({"kind": "describing", "id": self._header["id"], "is_over": False, "type": kind})
        with contextlib.suppress(BaseException):
            self._explain(error)
        failure = failure_of(error, self._encoder)
        self._channel.send({"kind": "describing", "id": self._header["id"], "is_over": True, "type": kind})
        return failure

    def answer(self) -> Answer:
        """Return the frame that ends the invocation."""
        duration = time.perf_counter() - self._started
        flush_streams()
        if (size := sum(map(len, self._encoder.blobs))) > MAX_ANSWER_BYTES:
            limit = f"{size} bytes in values that are not large by themselves; the limit is {MAX_ANSWER_BYTES}"
            self.fail(PayloadError(f"the value that the task returned takes {limit}"))
        head = {"kind": "result", "id": self._header["id"], "made": self._encoder.made, "duration": duration}
        return head | self._answer, self._encoder.blobs

    def _member(self, value: Any) -> dict[str, Any]:
        """Return the outputs in a value, and item by item each output that a task is mapped over."""
        outputs, encoder = self._outputs(value), self._encoder
        split = {name: _items(name, outputs[name]) for name in self._header["split"]}
        return {
            "outputs": {name: encoder.encode(item, name) for name, item in outputs.items()},
            "split": {name: [encoder.encode(item, name) for item in items] for name, items in split.items()},
        }

    def _batch(self, value: Any) -> dict[str, Any]:
        """Return one answer for each member of a batch."""
        unread, size = self._header["unread"], len(self._header["items"])
        try:
            # A dict or a text would be taken apart into keys or letters, and a set has no order.
            values = None if isinstance(value, Mapping | Set | str | bytes | bytearray) else list(value)
        except TypeError:
            values = None
        if values is None:
            raise PayloadError(f"a batch of {size} must return a list; it returned {type(value).__name__}")
        if len(values) != size - len(unread):
            raise PayloadError(f"a batch of {size - len(unread)} returned {len(values)} values; one for each is needed")
        found = iter(values)
        return {"items": [self._member_of_batch(unread[i] if i in unread else next(found)) for i in range(size)]}

    def _member_of_batch(self, value: Any) -> dict[str, Any]:
        encoder = self._encoder
        if isinstance(value, BaseException):
            return {"failure": self._describe(value)}
        kept = (len(encoder.blobs), len(encoder.made))
        try:
            return self._member(value)
        except BaseException as error:
            encoder.take_back(*kept)
            return {"failure": self._describe(error)}

    def _outputs(self, value: Any) -> dict[str, Any]:
        declared, style = self._header["outputs"], self._return_style
        has_all = isinstance(value, dict) and all(name in value for name in declared)
        if style == "auto":
            style = "mapping" if has_all and (declared or all(isinstance(k, str) for k in value)) else "value"
            if style == "value" and len(declared) > 1:
                style = "mapping"
        if style == "value":
            return {declared[0] if declared else "result": value}
        if not isinstance(value, dict):
            names = f" with {', '.join(map(repr, declared))}" if declared else ""
            raise PayloadError(f"the task must return a dict{names}; it returned {type(value).__name__}")
        if not has_all:
            missing = ", ".join(repr(name) for name in declared if name not in value)
            returned = ", ".join(map(str, value)) or "nothing"
            raise PayloadError(f"the task returned no output {missing}; it returned: {returned}")
        named = {utf8(str(name)): item for name, item in value.items()}
        if len(named) < len(value):
            raise PayloadError(f"the task returned two outputs of one name; it returned: {', '.join(map(str, value))}")
        return named


def end_child(error: BaseException | None) -> NoReturn:
    """End a process that a task forked, as Python ends a program."""
    status: object = 0
    with contextlib.suppress(BaseException):
        flush_streams()
        if isinstance(error, SystemExit):
            status = 0 if error.code is None else error.code
        elif error is not None:
            status = "".join(traceback.format_exception(error)).rstrip("\n")
        if not isinstance(status, int):
            os.write(2, f"{status}\n".encode(errors="backslashreplace"))
            status = 1
    os._exit(status & 0xFF if isinstance(status, int) else 1)


def _items(name: str, value: Any) -> list[Any]:
    if isinstance(value, str | bytes | dict) or not hasattr(value, "__iter__"):
        raise PayloadError(f"output {name!r} is mapped over and must be a list; it is of type {type(value).__name__}")
    return list(value)
