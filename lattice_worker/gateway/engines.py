"""How a gateway calls engines: the connections, and what of a request and an answer is passed on."""

import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import aiohttp

from lattice_worker.gateway.identity import keep_alive
from lattice_worker.gateway.routing import Route
from lattice_worker.gateway.stream import Watch

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
CONNECT_S = 5.0
# Of a request that is passed on, and of an answer.
PASSED = ("accept", "x-request-id", "user-agent")
RETURNED = ("content-type", "x-request-id", "retry-after", "openai-processing-ms")
INSTANCE_HEADER = "x-lattice-instance"
REQUEST_ERRORS = (aiohttp.ClientError, TimeoutError)
# Of them, those of a request that was not sent.
NOT_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
# By which a gateway tells another one that it did not pass a request on; 502 if it did and got no answer.
UNSENT_STATUS = 503


MAX_ANSWER_BYTES = 256 * 1024 * 1024  # Of an answer that is no stream.


class AnswerTooLargeError(Exception):
    """An answer is larger than a gateway keeps."""


def session() -> aiohttp.ClientSession:
    """Return the client for requests to engines, providers and other gateways."""
    # A connection for each request: an instance counts its open connections as requests.
    connector = aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=_socket)
    timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_S)
    # Answers are read on their way, and passed on without the header that would say how they are packed.
    headers = {"accept-encoding": "identity"}
    return aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers, auto_decompress=False)


def _socket(address: Any) -> socket.socket:
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setblocking(False)
    keep_alive(made)
    return made


def passed(headers: Mapping[str, str], route: Route) -> dict[str, str]:
    """Return the headers of a request to an engine. The caller's key stays here."""
    found = {name: headers[name] for name in PASSED if name in headers}
    return found | ({"authorization": f"Bearer {route.key}"} if route.key else {})


def returned(headers: Mapping[str, str]) -> dict[str, str]:
    """Return those headers of an answer that its caller gets."""
    return {name: headers[name] for name in RETURNED if name in headers}


async def whole_of(answer: aiohttp.ClientResponse) -> bytes:
    """Return a whole answer. Raises AnswerTooLargeError."""
    whole = bytearray()
    async for chunk in answer.content.iter_any():
        whole += chunk
        if len(whole) > MAX_ANSWER_BYTES:
            raise AnswerTooLargeError(f"over {MAX_ANSWER_BYTES} bytes")
    return bytes(whole)


async def events_of(answer: aiohttp.ClientResponse, watch: Watch) -> AsyncIterator[Iterator[bytes]]:
    """Yield the events of each chunk of a stream, and at its end the last one."""
    async for chunk in answer.content.iter_any():
        yield watch.feed(chunk)
    yield watch.end()
