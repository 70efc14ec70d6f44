"""Owns who may call what. Rule: whoever comes by the network shows a token, and may do what that token is for; of what
a stranger sends nothing is read.

The server's own socket asks for nothing: it lies in a folder that only the server's user may enter.
"""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from lattice.v1 import artifact_pb2, worker_pb2

from lattice_server.core.errors import AuthenticationError, AuthorizationError
from lattice_server.rpc.context import Context

log = logging.getLogger(__name__)

HEADER = "authorization"
SCHEME = "bearer"
HEALTH = f"/{health_pb2.DESCRIPTOR.services_by_name['Health'].full_name}"
WORKERS = f"/{worker_pb2.DESCRIPTOR.services_by_name['WorkerService'].full_name}"
ARTIFACTS = f"/{artifact_pb2.DESCRIPTOR.services_by_name['ArtifactService'].full_name}"
CONNECT = f"{WORKERS}/Connect"
HANG_UP_S = 2.0
# The services and single methods each subject may call; None is everything.
MAY_CALL: Mapping[str, frozenset[str] | None] = {
    "operator": None,
    "worker": frozenset({WORKERS, f"{ARTIFACTS}/ReadArtifact", HEALTH}),
}

Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class Authentication:
    """The tokens of a server. `token` is the operator's; `worker_token` is for workers that executors start."""

    token: str
    worker_token: str

    def check(self, method: str, metadata: Metadata) -> None:
        """Let a call pass that comes with the right token. Raises AuthenticationError, AuthorizationError."""
        allowed = MAY_CALL[self._subject(metadata)]
        if allowed is not None and method not in allowed and method.rpartition("/")[0] not in allowed:
            raise AuthorizationError("PERMISSION_DENIED", f"a worker's token does not allow {method}")

    def _subject(self, metadata: Metadata) -> str:
        shown = next((value for key, value in metadata if key == HEADER), None)
        if shown is None:
            text = f"this server asks for a token: send the metadata `{HEADER}: Bearer TOKEN`"
            raise AuthenticationError("UNAUTHENTICATED", text)
        text = shown.decode(errors="replace") if isinstance(shown, bytes) else shown
        scheme, _, token = text.partition(" ")
        # Both are always compared, in a time that says nothing of where they differ.
        found = {
            "operator": hmac.compare_digest(token.encode(), self.token.encode()),
            "worker": hmac.compare_digest(token.encode(), self.worker_token.encode()),
        }
        subject = next((name for name, is_right in found.items() if is_right), None)
        if subject is None or scheme.lower() != SCHEME:
            raise AuthenticationError("UNAUTHENTICATED", "the token is not valid here")
        return subject


class AuthenticationInterceptor(grpc.aio.ServerInterceptor):
    """Checks calls by their headers alone: a message could be large, and costs much more memory than it has bytes."""

    def __init__(self, authentication: Authentication) -> None:
        self._authentication = authentication

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Let a call with the right token go its way as if this were not here; refuse any other."""
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        try:
            self._authentication.check(method, handler_call_details.invocation_metadata or ())
        except (AuthenticationError, AuthorizationError) as error:
            # On the wire every call is a stream of messages, and only one declared as such may end before it is read.
            if method.startswith(f"{HEALTH}/"):
                serialize = handler.response_serializer
                return grpc.stream_stream_rpc_method_handler(_health(handler), response_serializer=serialize)
            return grpc.stream_stream_rpc_method_handler(_refusal(method, error))
        return handler


def _health(handler: Any) -> Any:
    """Tell strangers of the server as a whole: which service they ask for is in what is not read."""

    async def tell(requests: AsyncIterator[bytes], context: Context) -> None:
        response = await (handler.unary_unary or handler.unary_stream)(health_pb2.HealthCheckRequest(), context)
        if response is not None:  # a watch writes by itself
            await context.write(response)

    return tell


def _refusal(method: str, error: AuthenticationError | AuthorizationError) -> Any:
    async def refuse(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        log.info("refused %s to %s: %s", method, context.peer(), error.message)
        if method != CONNECT:
            raise error
        # In band, as all errors of that stream.
        close = worker_pb2.Close(reason=worker_pb2.CLOSE_REASON_UNAUTHENTICATED, message=error.message)
        yield worker_pb2.ConnectResponse(close=close).SerializeToString()
        # The worker hangs up when it has read that, which ends this; ending first could lose it.
        await asyncio.sleep(HANG_UP_S)

    return refuse
