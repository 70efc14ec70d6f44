"""Owns who may call what. Rule: whoever comes by the network shows a token, and may do what that token is for.

The server's own socket asks for nothing: it lies in a folder that only the server's user may enter.
"""

import hmac
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from grpc_health.v1 import health_pb2
from grpc_interceptor.server import AsyncServerInterceptor
from lattice.v1 import results_pb2, worker_pb2

from lattice_server.core.errors import AuthenticationError, AuthorizationError
from lattice_server.rpc.context import Context

log = logging.getLogger(__name__)

HEADER = "authorization"
SCHEME = "bearer"
HEALTH = f"/{health_pb2.DESCRIPTOR.services_by_name['Health'].full_name}"
WORKERS = f"/{worker_pb2.DESCRIPTOR.services_by_name['WorkerService'].full_name}"
RESULTS = f"/{results_pb2.DESCRIPTOR.services_by_name['ResultsService'].full_name}"
CONNECT = f"{WORKERS}/Connect"
# What each subject may call, services and single methods; None is everything.
MAY_CALL: Mapping[str, frozenset[str] | None] = {
    "operator": None,
    "worker": frozenset({WORKERS, f"{RESULTS}/ReadArtifact"}),
}

Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class Authentication:
    """The tokens of a server. `token` is the operator's; `worker_token` is for workers that executors start."""

    token: str
    worker_token: str

    def check(self, method: str, metadata: Metadata) -> None:
        """Let a call pass that comes with the right token. Raises AuthenticationError, AuthorizationError."""
        if method.startswith(f"{HEALTH}/"):
            return
        allowed = MAY_CALL[self._subject(metadata)]
        if allowed is not None and method not in allowed and method.rpartition("/")[0] not in allowed:
            raise AuthorizationError("PERMISSION_DENIED", f"a worker's token does not allow {method}")

    def check_call(self, method: str, context: Context) -> None:
        """Do the same for a call that has begun; one over the server's own socket passes without a token."""
        if context.peer().startswith("unix:"):
            return
        try:
            self.check(method, context.invocation_metadata() or ())
        except (AuthenticationError, AuthorizationError) as error:
            log.info("refused %s to %s: %s", method, context.peer(), error.message)
            raise

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


class AuthenticationInterceptor(AsyncServerInterceptor):
    """Checks calls before they reach a servicer, except `Connect`, whose servicer refuses in band."""

    def __init__(self, authentication: Authentication) -> None:
        self._authentication = authentication

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Let a call with the right token go its way as if this were not here; look closer at any other."""
        method = handler_call_details.method
        if method == CONNECT:
            return await continuation(handler_call_details)
        try:
            self._authentication.check(method, handler_call_details.invocation_metadata or ())
        except (AuthenticationError, AuthorizationError):
            # Only the call itself knows where it comes from, and only inside it an error becomes a status.
            return await super().intercept_service(continuation, handler_call_details)  # type: ignore[no-untyped-call]
        return await continuation(handler_call_details)

    async def intercept(self, method: Any, request_or_iterator: Any, context: Context, method_name: str) -> Any:
        """Make the call, if it may be made."""
        self._authentication.check_call(method_name, context)
        return await super().intercept(method, request_or_iterator, context, method_name)
