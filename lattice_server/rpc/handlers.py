"""Owns the common parts of handlers: the type of their context, how long a stream waits for its peer to end it, and
the type of functions that are told of errors."""

from collections.abc import Callable
from typing import Any, TypeAlias

import grpc

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
# The peer ends its side once it has read the last message. A server that ended first could lose that message.
PEER_END_S = 2.0
# Called with the reason of each error that a caller gets, as a status or as a message of a stream.
OnError: TypeAlias = Callable[[str], None]


def ignore(_: str) -> None:
    """Take no notice of an error."""
