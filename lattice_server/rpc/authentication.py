"""Authenticates callers by their tokens. Rule: a call by the network needs a valid token before its messages are read,
and ends when the token is no longer valid.

The server's own socket needs no token: it lies in a folder that only the server's user may enter.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from lattice.v1 import worker_pb2

from lattice_server.core.errors import AuthenticationError, AuthorizationError
from lattice_server.rpc import authorization, callers
from lattice_server.rpc.authorization import HEALTH
from lattice_server.rpc.callers import Caller, Metadata, no_longer_valid
from lattice_server.rpc.handlers import PEER_END_S, Context, OnError, ignore
from lattice_server.rpc.rate_limited_log import RateLimitedLog
from lattice_server.tokens import Credential, digest_of

log = logging.getLogger(__name__)

HEADER = "authorization"
SCHEME = "bearer"
CONNECT = "/lattice.v1.WorkerService/Connect"
# Expiry is by the wall clock, which may be set while a timer of the monotonic clock runs.
MAX_TIMER_S = 3600.0


class Authentication:
    """The valid credentials; lives on the main thread.

    `own` are valid for the server's whole life. `replace` sets the credentials of the tokens file.
    """

    def __init__(self, own: Sequence[Credential], clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._own = {credential.digest for credential in own}
        self._callers = {credential.digest: Caller(credential) for credential in own}
        self._timer: asyncio.TimerHandle | None = None

    def authenticate(self, metadata: Metadata) -> Caller:
        """Return the caller with a valid token. Raises AuthenticationError."""
        shown = next((value for key, value in metadata if key == HEADER), None)
        if shown is None:
            text = f"this server needs a token: send the metadata `{HEADER}: Bearer TOKEN`"
            raise AuthenticationError("UNAUTHENTICATED", text)
        text = shown.decode(errors="replace") if isinstance(shown, bytes) else shown
        scheme, _, token = text.partition(" ")
        digest = digest_of(token)
        # The time of a look-up depends on digests only, from which no token can be derived.
        caller = self._callers.get(digest)
        is_right = caller is not None and hmac.compare_digest(caller.credential.digest, digest)
        if caller is None or not is_right or scheme.lower() != SCHEME:
            raise AuthenticationError("UNAUTHENTICATED", "the token is not valid here")
        expires_s = caller.credential.expires_s
        if expires_s is not None and expires_s <= self._clock():
            raise no_longer_valid()
        return caller

    def issue(self, credential: Credential) -> None:
        """Make a credential valid until it is revoked."""
        self._own.add(credential.digest)
        self._callers[credential.digest] = Caller(credential)

    def revoke(self, digest: str) -> None:
        """Make a credential invalid, and end its calls."""
        self._own.discard(digest)
        if (caller := self._callers.pop(digest, None)) is not None:
            caller.end()

    def replace(self, credentials: Sequence[Credential]) -> None:
        """Set the credentials of the tokens file, and end the calls of those it no longer has."""
        wanted = {credential.digest: credential for credential in credentials}
        for digest, caller in list(self._callers.items()):
            if digest not in self._own and wanted.get(digest) != caller.credential:
                log.info("a token of %r is no longer valid", caller.subject)
                del self._callers[digest]
                caller.end()
        for digest, credential in wanted.items():
            self._callers.setdefault(digest, Caller(credential))
        self._expire()

    def _expire(self) -> None:
        """End the calls of expired tokens, now and when the next token expires."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._clock()
        left = []
        for caller in self._callers.values():
            expires_s = caller.credential.expires_s
            if expires_s is not None and not caller.is_over:
                if expires_s <= now:
                    log.info("a token of %r has expired", caller.subject)
                    caller.end()
                else:
                    left.append(expires_s - now)
        if left:
            self._timer = asyncio.get_running_loop().call_later(min(*left, MAX_TIMER_S), self._expire)


class TrustInterceptor(grpc.aio.ServerInterceptor):
    """Gives every call all scopes: on the server's own socket, or on a server without tokens."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Mark the caller as trusted."""
        callers.enter(callers.TRUSTED, handler_call_details.invocation_metadata or ())
        return await continuation(handler_call_details)


class AuthenticationInterceptor(grpc.aio.ServerInterceptor):
    """Checks calls by their headers, before a large message of an unauthenticated caller can use memory."""

    def __init__(self, authentication: Authentication, on_error: OnError = ignore) -> None:
        self._authentication = authentication
        self._on_error = on_error
        self._refusals = RateLimitedLog(log)

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Admit a call whose token is valid and has the scope of the method; refuse any other."""
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        headers = handler_call_details.invocation_metadata or ()
        try:
            caller = self._authentication.authenticate(headers)
            authorization.check(method, caller.credential.scopes)
        except (AuthenticationError, AuthorizationError) as error:
            # Declared as a stream: grpcio lets no other call end before its request is read.
            if method.startswith(HEALTH):
                serialize = handler.response_serializer
                return grpc.stream_stream_rpc_method_handler(_health(handler), response_serializer=serialize)
            return grpc.stream_stream_rpc_method_handler(self._refusal(method, error))
        callers.enter(caller, headers)
        if method != CONNECT and (task := asyncio.current_task()) is not None:
            # A worker's stream ends with a message that says why.
            caller.ends.add(task.cancel)
            task.add_done_callback(partial(_forget, caller, task.cancel))
        return handler

    def _refusal(self, method: str, error: AuthenticationError | AuthorizationError) -> Any:
        async def refuse(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
            self._refusals.info("refused %s to %s: %s", method, context.peer(), error.message)
            if method != CONNECT:
                raise error
            # As a message, like all errors of that stream.
            self._on_error(error.reason)
            close = worker_pb2.Close(reason=worker_pb2.CLOSE_REASON_UNAUTHENTICATED, message=error.message)
            yield worker_pb2.ConnectResponse(close=close).SerializeToString()
            await asyncio.sleep(PEER_END_S)

        return refuse


def _forget(caller: Caller, end: Callable[[], object], task: asyncio.Task[Any]) -> None:
    caller.ends.discard(end)


def _health(handler: Any) -> Any:
    """Answer unauthenticated health checks for the whole server: the service they name is in the unread request."""

    async def tell(requests: AsyncIterator[bytes], context: Context) -> None:
        response = await (handler.unary_unary or handler.unary_stream)(health_pb2.HealthCheckRequest(), context)
        if response is not None:  # a watch writes by itself
            await context.write(response)

    return tell
