"""Runs invocations: loads their functions, calls them, and returns their answers.

Rule: whatever user code does, the answer travels on the control socket and never on the user's own output.
"""

import asyncio
import functools
import gc
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from lattice_worker.runner.frames import Channel
from lattice_worker.runner.invocation import tracing
from lattice_worker.runner.invocation.binding import bind_all
from lattice_worker.runner.invocation.called import Call
from lattice_worker.runner.invocation.calls import columns, takes_params_alone
from lattice_worker.runner.invocation.functions import Loaded, load
from lattice_worker.runner.invocation.generators import is_generator, stream, stream_async
from lattice_worker.runner.invocation.outcome import Answer, Outcome
from lattice_worker.runner.invocation.output import Output
from lattice_worker.runner.surroundings.memory import memory_limit
from lattice_worker.runner.surroundings.reset import Baseline


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
            if is_generator(value) and not output.header["batched"]:
                value = stream(output, value, self._function(output.header))
            if isinstance(value, Call):
                value = value.result()
            outcome.take(value)
        return outcome.answer()

    async def run_async(self, output: Output, blobs: list[bytes]) -> Answer:
        """Run an invocation of a coroutine function to its end. Never raises, also when it is cancelled."""
        outcome = self._outcome(output)
        with outcome, memory_limit(output.header["memory_limit"]):
            value = self._call(output.header, blobs)
            if inspect.isawaitable(value):
                value = await value
            if is_generator(value) and not output.header["batched"]:
                value = await stream_async(output, value, self._function(output.header))
            if isinstance(value, Call):
                value = await value
            outcome.take(value)
        return outcome.answer()

    def _outcome(self, output: Output) -> "Outcome":
        explain = functools.partial(self._explain, output.header)
        return Outcome(output.header, self._return_style(output.header), self._channel, explain)

    def _function(self, header: dict[str, Any]) -> Callable[..., Any]:
        return self._loaded[header["digest"]].function

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
        tracing.enter(header)
        style = self._definitions[header["digest"]][0]["call_style"]
        takes_params = style == "params" or (style == "auto" and takes_params_alone(function))
        if not header["batched"]:
            (inputs,) = header["items"]
            bound = bind_all(inputs, blobs)
            return function(bound) if takes_params else function(**bound)
        # An item whose inputs cannot be read has failed by itself; the others are called without it.
        header["unread"] = {}
        batch = []
        for position, inputs in enumerate(header["items"]):
            try:
                batch.append(bind_all(inputs, blobs))
            except BaseException as error:
                header["unread"][position] = error
        if not batch:
            return []
        return function(batch) if takes_params else function(**columns(function, batch))
