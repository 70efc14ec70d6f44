"""Owns the sizes of messages. Rule: items are coalesced into messages that every gRPC client accepts."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from google.protobuf.message import Message

Item = TypeVar("Item", bound=Message | bytes)
# gRPC refuses messages over 4 MiB unless it is told otherwise.
PART_BYTES = 2 * 1024 * 1024
# The most bytes that an envelope adds to its items.
ENVELOPE_BYTES = 1024
# The most bytes in one message of an upload.
UPLOAD_CHUNK_BYTES = 1024 * 1024


def in_parts(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield items in lists of at most `PART_BYTES`; one that is larger alone."""
    part: list[Item] = []
    size = 0
    for item in items:
        own = len(item) if isinstance(item, bytes) else item.ByteSize()
        if part and size + own > PART_BYTES:
            yield part
            part, size = [], 0
        part.append(item)
        size += own
    if part:
        yield part
