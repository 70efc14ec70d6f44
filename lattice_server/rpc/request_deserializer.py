"""Deserializes the requests of callers. Rule: a request over a limit is refused before any of it is parsed.

A large request is scanned first, record by record, which gives the number of its tasks and where it may be cut. Then it
is parsed in slices. Parsing bytes of protobuf into a message that has some already merges them, so a message parsed in
slices is the message parsed at once.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from lattice.v1 import task_pb2, workflow_pb2

from lattice_server.core.errors import ExhaustedError, LatticeError, invalid_field
from lattice_server.core.frozen import frozen
from lattice_server.engine.slices import Slices

# The most of one slice: a thousand records are parsed in about a millisecond.
SLICE_RECORDS = 1000
SLICE_BYTES = 256 * 1024
# How many of those are scanned at once: that takes some milliseconds.
SCANNED_SLICES = 2
# Shorter requests are parsed at once, unless they may have too many tasks.
SLICED_BYTES = 64 * 1024
COUNTED = frozenset({task_pb2.TaskSpec.DESCRIPTOR.full_name, workflow_pb2.Edge.DESCRIPTOR.full_name})
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
MAX_VARINT_BYTES = 10
NO_LISTS: Mapping[int, FieldDescriptor] = MappingProxyType({})


@frozen
class MessageLimits:
    """The most bytes and tasks of one message of a caller. The number also limits edges, and all other records."""

    message_bytes: int
    tasks: int


@frozen
class Unread:
    """A request that is parsed when its call begins."""

    data: bytes


@frozen
class Refused:
    """A refused request. Raising its error while grpcio deserializes would log a traceback."""

    error: LatticeError


class RequestDeserializer:
    """Reads the requests of one method."""

    def __init__(self, method: str, limits: MessageLimits, slices: Slices) -> None:
        """Find the tasks in the requests of a method. `method` is the path of the call; raises KeyError."""
        found = descriptor_pool.Default().FindMethodByName(method.strip("/").replace("/", "."))
        self._kind = message_factory.GetMessageClass(found.input_type)
        self._path = path_of(found.input_type)
        self._lists = lists_of(found.input_type)
        self._limits = limits
        self._slices = slices

    def deserialize(self, data: bytes) -> Message | Unread | Refused:
        """Return a request, or a stand-in for `read` when it is large or refused."""
        if len(data) > self._limits.message_bytes:
            text = f"a message of {len(data)} bytes; the limit is {self._limits.message_bytes}: send it in parts"
            return Refused(_too_large("message_bytes", self._limits.message_bytes, text))
        # A task takes two bytes at least.
        if len(data) > min(SLICED_BYTES, 2 * self._limits.tasks):
            return Unread(data)
        try:
            return self._kind.FromString(data)
        except DecodeError as error:
            return Refused(unreadable(error))

    async def read(self, found: Any) -> Any:
        """Return the request that `deserialize` could not give at once. Raises ExhaustedError, InvalidError."""
        if isinstance(found, Refused):
            raise found.error
        if not isinstance(found, Unread):
            return found
        cuts = []
        try:
            for number, cut in enumerate(scan(found.data, self._path, self._limits.tasks, self._lists), 1):
                if cut is not None:
                    cuts.append(cut)
                if number % SCANNED_SLICES == 0:
                    # Not among all that takes its turn: a refusal should not wait for work that was accepted.
                    await asyncio.sleep(0)
            message = self._kind()
            for depth, start, end in cuts:
                target = message
                for field in self._path[:depth]:
                    target = getattr(target, field.name)
                target.MergeFromString(found.data[start:end])
                await self._slices.pause()
        except DecodeError as error:
            raise unreadable(error) from None
        return message

    async def read_each(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Yield the messages of a stream as `read` returns them."""
        async for found in requests:
            yield await self.read(found)


def unreadable(error: DecodeError) -> LatticeError:
    """Return the error for bytes that are not the message they should be, or hold text that is not UTF-8."""
    return invalid_field("request", str(error))


def path_of(message: Descriptor) -> tuple[FieldDescriptor, ...]:
    """Return the fields that lead to the tasks, or edges, of a message; none when it has none."""
    for field in message.fields:
        inner = field.message_type
        if inner is None:
            continue
        if field.is_repeated:
            if inner.full_name in COUNTED:
                return (field,)
        elif inner.file.package == message.file.package and (found := path_of(inner)):
            return (field, *found)
    return ()


def lists_of(message: Descriptor) -> dict[int, FieldDescriptor]:
    """Return the fields that hold lists of requests, such as `additions`, each with the field of the tasks in one."""
    found = {}
    for field in message.fields:
        if field.is_repeated and field.message_type is not None:
            for inner in field.message_type.fields:
                if inner.is_repeated and inner.message_type is not None and inner.message_type.full_name in COUNTED:
                    found[field.number << 3 | LENGTH] = inner
    return found


def scan(
    data: bytes, path: Sequence[FieldDescriptor], most: int, lists: Mapping[int, FieldDescriptor] = NO_LISTS
) -> Iterator[tuple[int, int, int] | None]:
    """Yield the slices of a message: their depth in `path`, their start and their end.

    None is yielded for a part of a request in one of the `lists`, whose tasks are counted: it is parsed as a whole.

    Raises:
        ExhaustedError: there are more than `most` tasks, or more than that of anything else.
        DecodeError: the bytes are no message.
    """
    counts = {"tasks": 0, "other": 0}
    yield from _scan(data, 0, len(data), path, 0, most, counts, lists)


def _scan(
    data: bytes,
    at: int,
    end: int,
    path: Sequence[FieldDescriptor],
    depth: int,
    most: int,
    counts: dict[str, int],
    lists: Mapping[int, FieldDescriptor] = NO_LISTS,
) -> Iterator[tuple[int, int, int] | None]:
    wanted = path[depth].number << 3 | LENGTH if depth < len(path) else -1
    is_last = depth == len(path) - 1
    start, records, tasks, others = at, 0, counts["tasks"], counts["other"]
    while at < end:
        begun = at
        tag = data[at]
        at += 1
        if tag >= 0x80:
            tag, at = _varint(data, begun, end)
        wire = tag & 7
        if wire == LENGTH:
            size, body = _varint(data, at, end)
            at = body + size
        elif wire == VARINT:
            _, at = _varint(data, at, end)
        elif wire in {FIXED64, FIXED32}:
            at += 8 if wire == FIXED64 else 4
        else:
            raise DecodeError("a group, or a field of no known kind")
        if at > end:
            raise DecodeError("a field is longer than its message")
        if tag == wanted and not is_last:
            # Earlier fields are merged first: of two values of a oneof the last one counts.
            if begun > start:
                yield depth, start, begun
            # Present even when it is empty.
            yield depth + 1, body, body
            counts["tasks"], counts["other"] = tasks, others
            yield from _scan(data, body, at, path, depth + 1, most, counts)
            tasks, others = counts["tasks"], counts["other"]
            start, records = at, 0
            continue
        if tag in lists:
            counts["tasks"], counts["other"] = tasks, others
            for _ in _scan(data, body, at, (lists[tag],), 0, most, counts):
                yield None
            tasks, others = counts["tasks"], counts["other"]
        if tag == wanted:
            tasks += 1
        else:
            others += 1
        if tasks > most or others > most:
            what = path[-1].name if path and tasks > most else "entries"
            text = f"more than {most} {what} in one message; send them in parts"
            raise _too_large("message_tasks", most, text)
        records += 1
        if records >= SLICE_RECORDS or at - start >= SLICE_BYTES:
            yield depth, start, at
            start, records = at, 0
    if at > start:
        yield depth, start, at
    counts["tasks"], counts["other"] = tasks, others


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Return a number and where it ends. Raises DecodeError."""
    value = shift = 0
    for index in range(at, min(end, at + MAX_VARINT_BYTES)):
        byte = data[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, index + 1
        shift += 7
    raise DecodeError("a number that does not end")


def _too_large(limit: str, value: int, text: str) -> ExhaustedError:
    return ExhaustedError("MESSAGE_TOO_LARGE", text, metadata={"limit": limit, limit: str(value)})
