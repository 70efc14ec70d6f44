"""Owns how much is coalesced into one message.

Rule: what many small things add up to never becomes a message that the other side refuses, or waits for too long.
"""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from google.protobuf.message import Message

Item = TypeVar("Item", bound=Message)
# gRPC refuses messages over 4 MiB unless it is told otherwise.
PART_BYTES = 2 * 1024 * 1024
# What a message has around what it carries.
ENVELOPE_BYTES = 1024


def in_parts(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield items in lists of at most `PART_BYTES`; one that is larger alone."""
    part: list[Item] = []
    size = 0
    for item in items:
        own = item.ByteSize()
        if part and size + own > PART_BYTES:
            yield part
            part, size = [], 0
        part.append(item)
        size += own
    if part:
        yield part
