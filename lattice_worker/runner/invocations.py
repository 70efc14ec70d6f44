"""Runs invocations and answers with their outcomes.

Rule: whatever user code does, the answer travels on the control socket and never on the user's own output.
"""

import asyncio
import contextlib
import functools
import gc
import inspect
import os
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, Self

from lattice_worker.runner.artifacts import Encoder, open_artifact
from lattice_worker.runner.calls import columns, takes_params_alone
from lattice_worker.runner.failures import failure_of
from lattice_worker.runner.frames import MAX_FRAME_BYTES, Channel
from lattice_worker.runner.functions import Loaded, load
from lattice_worker.runner.memory import memory_limit
from lattice_worker.runner.output import Output, flush_streams
from lattice_worker.runner.reset import Baseline
from lattice_worker.runner.text import message_of, type_name, utf8
from lattice_worker.runner.values import WITH_OUTPUTS, PartError, PayloadError, decode_value, part_of

MAX_ANSWER_BYTES = MAX_FRAME_BYTES // 2
# What a class is called, whatever its metaclass says.
_NAME: Callable[[type], str] = type.__dict__["__name__"].__get__

Answer = tuple[dict[str, Any], list[bytes]]


class Program:
    """Functions, by digest, and the invocations of them. `baseline` is what loading code may change for good."""

    def __init__(self, channel: Channel, baseline: Baseline) -> None:
        self._channel = channel
        self._baseline = baseline
        self._definitions: dict[str, tuple[dict[str, Any], bytes]] = {}
        self._loaded: dict[str, Loaded] = {}

    def define(self, header: dict[str, Any], blobs: list[bytes]) -> None:
        """Remember a function; it is loaded when first called."""
        self._definitions[header["digest"]] = (header, blobs[0] if blobs else b"")

    def forget(self, digests: Iterable[str]) -> None:
        """Drop functions, none of which is being called."""
        for digest in digests:
            self._definitions.pop(digest, None)
            self._loaded.pop(digest, None)
        # A function and the names of its script refer to each other. They may be large and few, so that nothing else
        # would have them collected for long.
        gc.collect()

    def run(self, output: Output, blobs: list[bytes]) -> Answer:
        """Run an invocation to its end. Never raises."""
        outcome = self._outcome(output)
        with outcome, memory_limit(output.header["memory_limit"]):
            value = self._call(output.header, blobs)
            if inspect.iscoroutine(value):
                value = asyncio.run(value)
            outcome.take(value)
        return outcome.answer()

    async def run_async(self, output: Output, blobs: list[bytes]) -> Answer:
        """Run an invocation of a coroutine function to its end. Never raises, also when it is cancelled."""
        outcome = self._outcome(output)
        with outcome, memory_limit(output.header["memory_limit"]):
            value = self._call(output.header, blobs)
            outcome.take(await value if inspect.isawaitable(value) else value)
        return outcome.answer()

    def _outcome(self, output: Output) -> "Outcome":
        explain = functools.partial(self._explain, output.header)
        return Outcome(output.header, self._return_style(output.header), self._channel, explain)

    def _return_style(self, header: dict[str, Any]) -> str:
        return str(self._definitions[header["digest"]][0]["return_style"])

    def _explain(self, header: dict[str, Any], error: BaseException) -> None:
        if (loaded := self._loaded.get(header["digest"])) is not None:
            loaded.enter()
            loaded.explain(error)

    def _load(self, digest: str) -> Callable[..., Any]:
        if digest not in self._loaded:
            self._loaded[digest] = load(*self._definitions[digest])
            # What modules set up when they are imported stays: they are not imported again.
            self._baseline.capture()
        loaded = self._loaded[digest]
        loaded.enter()
        self._baseline.main = loaded.main
        return loaded.function

    def _call(self, header: dict[str, Any], blobs: list[bytes]) -> Any:
        function = self._load(header["digest"])
        style = self._definitions[header["digest"]][0]["call_style"]
        takes_params = style == "params" or (style == "auto" and takes_params_alone(function))
        if not header["batched"]:
            (inputs,) = header["items"]
            bound = _bind_all(inputs, blobs)
            return function(bound) if takes_params else function(**bound)
        # An item whose inputs cannot be read has failed by itself; the others are called without it.
        header["unread"] = {}
        batch = []
        for position, inputs in enumerate(header["items"]):
            try:
                batch.append(_bind_all(inputs, blobs))
            except BaseException as error:
                header["unread"][position] = error
        if not batch:
            return []
        return function(batch) if takes_params else function(**columns(function, batch))


class Outcome:
    """What an invocation answers: built from what its function returns, or from what is raised in its `with` block."""

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
        """Encode what the function returned."""
        self._answer = self._batch(value) if self._header["batched"] else self._member(value)

    def fail(self, error: BaseException) -> None:
        """Describe what the function raised, or what is wrong with what it returned. Never raises."""
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
            self.fail(PayloadError(f"what the task returned takes {limit}"))
        head = {"kind": "result", "id": self._header["id"], "made": self._encoder.made, "duration": duration}
        return head | self._answer, self._encoder.blobs

    def _member(self, value: Any) -> dict[str, Any]:
        """Return the outputs in a value, and item by item those that others are mapped over."""
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
            values = list(value)
        except TypeError:
            raise PayloadError(f"a batch of {size} must return a list; it returned {type(value).__name__}") from None
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


def _bind_all(inputs: dict[str, Any], blobs: list[bytes]) -> dict[str, Any]:
    bound = {}
    for name, binding in inputs.items():
        try:
            bound[name] = _bind(binding, blobs)
        except PartError as error:
            raise PayloadError(f"input {name!r}: {error}") from None
        except (PayloadError, MemoryError):
            raise
        except BaseException as error:  # SystemExit too: unpickling runs code of the value's own.
            text = f"input {name!r} cannot be rebuilt here: {type_name(type(error))}: {message_of(error)}"
            raise PayloadError(text) from error
    return bound


def _bind(binding: dict[str, Any], blobs: list[bytes]) -> Any:
    if "items" in binding:
        items = binding["items"]
        if items and items[0].get("type") == WITH_OUTPUTS:
            return _decode(items[0], blobs, [_bind(item, blobs) for item in items[1:]])
        return [_bind(item, blobs) for item in items]
    if "select" in binding:
        return part_of(_bind(binding["of"], blobs), binding["select"])
    if "entries" in binding:
        return {key: _bind(item, blobs) for key, item in binding["entries"].items()}
    return _decode(binding, blobs)


def _decode(payload: dict[str, Any], blobs: list[bytes], outputs: list[Any] | None = None) -> Any:
    data = open_artifact(payload["path"]) if "path" in payload else blobs[payload["blob"]]
    return decode_value(payload["type"], data, outputs)


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
        raise PayloadError(f"output {name!r} is mapped over and must be a list; it is a {type(value).__name__}")
    return list(value)
