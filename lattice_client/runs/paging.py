"""Owns reading lists that a server returns in pages. Rule: a page token is passed back as it was received."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Protocol, TypeVar

from lattice_client.transport.channel import Channel

if TYPE_CHECKING:
    from grpc.aio import UnaryUnaryMultiCallable

# More rows than servers put in a page; each server returns as many as its limit.
PAGE_SIZE = 10_000


class ListRequest(Protocol):
    """The request of a call that lists rows."""

    page_token: str


class Page(Protocol):
    """The response of a call that lists rows; the last page has no token."""

    next_page_token: str


Q = TypeVar("Q", bound=ListRequest)
R = TypeVar("R", bound=Page)


async def pages(channel: Channel, method: "UnaryUnaryMultiCallable[Q, R]", request: Q) -> AsyncIterator[R]:
    """Yield the pages of a list. Raises RequestError, ClientClosedError."""
    while True:
        response = await channel.call(method, request)
        yield response
        if not response.next_page_token:
            return
        request.page_token = response.next_page_token
