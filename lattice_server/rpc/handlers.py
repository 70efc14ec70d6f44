"""Owns the common parts of handlers: the type of their context, how long a stream waits for its peer to end it, the
type of functions that are told of errors, and the serializer of responses."""

from collections.abc import Callable
from typing import Any, TypeAlias

import grpc

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
# The peer ends its side once it has read the last message. A server that ended first could lose that message.
PEER_END_S = 2.0
# Called with the reason of each error that a caller gets, as a status or as a message of a stream.
OnError: TypeAlias = Callable[[str], None]


def passing_bytes(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Return a serializer that takes serialized responses too, which a handler has made for several callers."""
    return lambda response: response if isinstance(response, bytes) else serialize(response)


def ignore(_: str) -> None:
    """Take no notice of an error."""
