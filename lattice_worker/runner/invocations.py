"""Runs invocations and answers with their outcomes.

Rule: whatever user code does, the answer travels on the control socket and never on the user's own output.
"""

import asyncio
import contextlib
import inspect
import time
from collections.abc import Callable, Iterator
from typing import Any

from lattice_worker.runner.artifacts import Encoder, open_artifact
from lattice_worker.runner.calls import columns, takes_params_alone
from lattice_worker.runner.failures import failure_of
from lattice_worker.runner.frames import Channel
from lattice_worker.runner.functions import Loaded, load
from lattice_worker.runner.memory import memory_limit
from lattice_worker.runner.output import Output, current, has_unread_output
from lattice_worker.runner.values import PayloadError, decode_value


class Program:
    """Functions, by digest, and the invocations of them; `is_alone` tells that they run one at a time."""

    def __init__(self, channel: Channel, *, is_alone: bool) -> None:
        self._channel = channel
        self._is_alone = is_alone
        self._definitions: dict[str, tuple[dict[str, Any], bytes]] = {}
        self._loaded: dict[str, Loaded] = {}

    def define(self, header: dict[str, Any], blobs: list[bytes]) -> None:
        """Remember a function; it is loaded when first called."""
        self._definitions[header["digest"]] = (header, blobs[0] if blobs else b"")

    def run(self, header: dict[str, Any], blobs: list[bytes]) -> bool:
        """Run an invocation of a plain function and send its outcome; return whether output is left to be read."""
        with self._outcome(header) as finish:
            value = self._call(header, blobs)
            if inspect.iscoroutine(value):
                value = asyncio.run(value)
            finish(value)
        return bool(header["has_raw"])

    async def run_async(self, header: dict[str, Any], blobs: list[bytes]) -> None:
        """Run an invocation of a coroutine function and send its outcome."""
        with self._outcome(header) as finish:
            value = self._call(header, blobs)
            finish(await value if inspect.isawaitable(value) else value)

    @contextlib.contextmanager
    def _outcome(self, header: dict[str, Any]) -> Iterator[Callable[[Any], None]]:
        output = Output(self._channel, header)
        token = current.set(output)
        encoder = Encoder(header)
        answer: dict[str, Any] = {"kind": "result", "id": header["id"]}
        started = time.perf_counter()

        def finish(value: Any) -> None:
            answer.update(
                self._answer_batch(header, value, encoder)
                if header["batched"]
                else self._answer(header, value, encoder)
            )

        try:
            with memory_limit(header["memory_limit"]):
                yield finish
        except BaseException as error:  # SystemExit too: user code must not end the runner by raising it
            encoder.take_back()
            if (loaded := self._loaded.get(header["digest"])) is not None:
                loaded.enter()
                loaded.explain(error)
            answer["failure"] = failure_of(error, encoder)
        finally:
            answer["made"] = encoder.made
            answer["duration"] = time.perf_counter() - started
            header["has_raw"] = answer["has_raw"] = self._is_alone and has_unread_output()
            output.flush()
            current.reset(token)
            self._channel.send(answer, encoder.blobs)

    def _load(self, digest: str) -> Callable[..., Any]:
        if digest not in self._loaded:
            self._loaded[digest] = load(*self._definitions[digest])
        loaded = self._loaded[digest]
        loaded.enter()
        return loaded.function

    def _call(self, header: dict[str, Any], blobs: list[bytes]) -> Any:
        function = self._load(header["digest"])
        style = self._definitions[header["digest"]][0]["call_style"]
        takes_params = style == "params" or (style == "auto" and takes_params_alone(function))
        if not header["batched"]:
            (inputs,) = header["items"]
            bound = {name: _bind(binding, blobs) for name, binding in inputs.items()}
            return function(bound) if takes_params else function(**bound)
        # An item whose inputs cannot be read has failed by itself; the others are called without it.
        header["unread"] = {}
        batch = []
        for position, inputs in enumerate(header["items"]):
            try:
                batch.append({name: _bind(binding, blobs) for name, binding in inputs.items()})
            except Exception as error:
                header["unread"][position] = error
        if not batch:
            return []
        return function(batch) if takes_params else function(**columns(function, batch))

    def _answer(self, header: dict[str, Any], value: Any, encoder: "Encoder") -> dict[str, Any]:
        """Return the outputs in a value, and item by item those that others are mapped over."""
        outputs = self._outputs(header, value)
        split = {name: _items(name, outputs[name]) for name in header["split"]}
        return {
            "outputs": {name: encoder.encode(item) for name, item in outputs.items()},
            "split": {name: [encoder.encode(item) for item in items] for name, items in split.items()},
        }

    def _answer_batch(self, header: dict[str, Any], value: Any, encoder: "Encoder") -> dict[str, Any]:
        """Return one answer for each member of a batch."""
        unread, size = header["unread"], len(header["items"])
        try:
            values = list(value)
        except TypeError:
            raise PayloadError(f"a batch of {size} must return a list; it returned {type(value).__name__}") from None
        if len(values) != size - len(unread):
            raise PayloadError(f"a batch of {size - len(unread)} returned {len(values)} values; one for each is needed")
        found = iter(values)
        return {
            "items": [
                self._answer_member(header, unread[i] if i in unread else next(found), encoder) for i in range(size)
            ]
        }

    def _answer_member(self, header: dict[str, Any], value: Any, encoder: "Encoder") -> dict[str, Any]:
        if isinstance(value, BaseException):
            return {"failure": failure_of(value, encoder)}
        kept = (len(encoder.blobs), len(encoder.made))
        try:
            return self._answer(header, value, encoder)
        except PayloadError as error:
            encoder.take_back(*kept)
            return {"failure": failure_of(error, encoder)}

    def _outputs(self, header: dict[str, Any], value: Any) -> dict[str, Any]:
        declared = header["outputs"]
        style = self._definitions[header["digest"]][0]["return_style"]
        has_all = isinstance(value, dict) and all(name in value for name in declared)
        if style == "auto":
            style = "mapping" if has_all and (declared or all(isinstance(k, str) for k in value)) else "value"
            if style == "value" and len(declared) > 1:
                style = "mapping"
        if style == "value":
            return {declared[0] if declared else "result": value}
        if not isinstance(value, dict):
            raise PayloadError(f"the task must return a dict with {declared}; it returned {type(value).__name__}")
        if not has_all:
            missing = ", ".join(repr(name) for name in declared if name not in value)
            returned = ", ".join(map(str, value)) or "nothing"
            raise PayloadError(f"the task returned no output {missing}; it returned: {returned}")
        return {str(name): item for name, item in value.items()}


def _bind(binding: dict[str, Any], blobs: list[bytes]) -> Any:
    if "items" in binding:
        return [_bind(item, blobs) for item in binding["items"]]
    if "entries" in binding:
        return {key: _bind(item, blobs) for key, item in binding["entries"].items()}
    if "path" not in binding:
        return decode_value(binding["type"], blobs[binding["blob"]])
    return decode_value(binding["type"], open_artifact(binding["path"]))


def _items(name: str, value: Any) -> list[Any]:
    if isinstance(value, str | bytes | dict) or not hasattr(value, "__iter__"):
        raise PayloadError(f"output {name!r} is mapped over and must be a list; it is a {type(value).__name__}")
    return list(value)
