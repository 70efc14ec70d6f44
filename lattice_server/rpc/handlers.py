"""Owns what all handlers share: the type of their context, and how long a stream waits for its peer to end it."""

from typing import Any, TypeAlias

import grpc

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
# The peer ends its side once it has read the last message. A server that ended first could lose that message.
PEER_END_S = 2.0
