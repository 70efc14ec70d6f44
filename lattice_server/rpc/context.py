"""Owns the name of what a handler is given besides its request, and the reading of requests that come in parts."""

from collections.abc import AsyncIterator
from typing import Any, TypeAlias, TypeVar

import grpc

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Part = TypeVar("Part")


async def whole(parts: AsyncIterator[Part], context: Context) -> AsyncIterator[Part]:
    """Yield the parts of a request. Raises CancelledError when the call breaks before its last one."""
    async for part in parts:
        yield part
    # grpcio ends the parts of a call that broke like those of one that is complete; reading on tells them apart.
    await context.read()
