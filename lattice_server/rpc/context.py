"""Owns the name of what a handler is given besides its request, and the reading of requests that come in parts."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeAlias, TypeVar

import grpc

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Part = TypeVar("Part")
LOOP_TURNS = 5


async def whole(parts: AsyncIterator[Part], context: Context) -> AsyncIterator[Part]:
    """Yield the parts of a request. Raises CancelledError when the call breaks before its last one."""
    async for part in parts:
        yield part
    # grpcio ends the parts of a call that broke like those of one that is complete; reading on tells them apart.
    await context.read()
    # Both may be true at once: gRPC's word that the call broke is then still in the event loop's queue.
    for _ in range(LOOP_TURNS):
        await asyncio.sleep(0)
