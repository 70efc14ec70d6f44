"""Tasks that are generators: each value that one yields is streamed, and its output is made of them."""

import asyncio
import inspect
from collections.abc import Callable, Generator
from typing import Any

from lattice_worker.runner.encoding.blame import refusal
from lattice_worker.runner.encoding.values import PayloadError, encode_value
from lattice_worker.runner.invocation.output import Output

# The attribute of a function that makes its output of the list of its chunks.
COMBINE = "__lattice_combine__"


def is_generator(value: Any) -> bool:
    """Whether a value yields others, with or without waiting."""
    return inspect.isgenerator(value) or inspect.isasyncgen(value)


def encoded_chunk(value: Any, output: Output) -> tuple[str, bytes]:
    """Return the media type and the encoding of a chunk. Raises PayloadError."""
    try:
        media_type, parts = encode_value(value, as_data=output.header.get("as_data", False))
    except MemoryError:
        raise
    except BaseException as error:  # SystemExit too: pickling runs code of the value's own.
        raise PayloadError(refusal("a chunk", value, error)) from error
    return media_type, b"".join(parts)


def stream(output: Output, generator: Any, function: Callable[..., Any]) -> Any:
    """Stream each value of a generator; return its output."""
    if inspect.isasyncgen(generator):
        return asyncio.run(stream_async(output, generator, function))
    return _stream_here(output, generator, function)


async def stream_async(output: Output, generator: Any, function: Callable[..., Any]) -> Any:
    """As `stream`, on an event loop that other invocations share."""
    found: list[Any] = []
    if inspect.isasyncgen(generator):
        async for value in generator:
            await output.chunks.send_async(0, *encoded_chunk(value, output))
            found.append(value)
        return _combined(function, found, None)
    try:
        while True:
            value = next(generator)
            await output.chunks.send_async(0, *encoded_chunk(value, output))
            found.append(value)
    except StopIteration as over:
        return _combined(function, found, over.value)


def _stream_here(output: Output, generator: Generator[Any, None, Any], function: Callable[..., Any]) -> Any:
    found: list[Any] = []
    while True:
        try:
            value = next(generator)
        except StopIteration as over:
            return _combined(function, found, over.value)
        output.chunks.send(0, *encoded_chunk(value, output))
        found.append(value)


def _combined(function: Callable[..., Any], found: list[Any], returned: Any) -> Any:
    combine = getattr(function, COMBINE, None)
    if combine is not None:
        return combine(found)
    return found if returned is None else returned
