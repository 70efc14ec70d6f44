"""Owns who calls, by their tokens. Rule: whoever comes by the network shows a token; without one nothing that is sent
is read, and a call ends when its token no longer holds.

The server's own socket asks for nothing: it lies in a folder that only the server's user may enter.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from lattice.v1 import worker_pb2

from lattice_server.core.errors import AuthenticationError, AuthorizationError
from lattice_server.rpc import authorization, callers
from lattice_server.rpc.authorization import HEALTH
from lattice_server.rpc.callers import Caller, no_longer_valid
from lattice_server.rpc.handlers import PEER_END_S, Context
from lattice_server.rpc.rate_limited_log import RateLimitedLog
from lattice_server.tokens import Credential, digest_of

log = logging.getLogger(__name__)

HEADER = "authorization"
SCHEME = "bearer"
CONNECT = "/lattice.v1.WorkerService/Connect"
# The clock of the day may be set while a timer of the other clock runs.
LOOK_AGAIN_S = 3600.0

Metadata = Iterable[tuple[str, str | bytes]]


class Authentication:
    """The credentials that hold; lives on the main thread.

    `own` are there for the server's whole life. Those of the tokens file come and go, as `replace` says.
    """

    def __init__(self, own: Sequence[Credential], clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._own = {credential.digest for credential in own}
        self._callers = {credential.digest: Caller(credential) for credential in own}
        self._timer: asyncio.TimerHandle | None = None

    def authenticate(self, metadata: Metadata) -> Caller:
        """Return who shows a token that holds. Raises AuthenticationError."""
        shown = next((value for key, value in metadata if key == HEADER), None)
        if shown is None:
            text = f"this server asks for a token: send the metadata `{HEADER}: Bearer TOKEN`"
            raise AuthenticationError("UNAUTHENTICATED", text)
        text = shown.decode(errors="replace") if isinstance(shown, bytes) else shown
        scheme, _, token = text.partition(" ")
        digest = digest_of(token)
        # The time of a look-up tells of digests alone, from which no token can be found.
        caller = self._callers.get(digest)
        is_right = caller is not None and hmac.compare_digest(caller.credential.digest, digest)
        if caller is None or not is_right or scheme.lower() != SCHEME:
            raise AuthenticationError("UNAUTHENTICATED", "the token is not valid here")
        expires_s = caller.credential.expires_s
        if expires_s is not None and expires_s <= self._clock():
            raise no_longer_valid()
        return caller

    def issue(self, credential: Credential) -> None:
        """Let a credential hold until it is revoked."""
        self._own.add(credential.digest)
        self._callers[credential.digest] = Caller(credential)

    def revoke(self, digest: str) -> None:
        """Let a credential hold no longer, and end its calls."""
        self._own.discard(digest)
        if (caller := self._callers.pop(digest, None)) is not None:
            caller.end()

    def replace(self, credentials: Sequence[Credential]) -> None:
        """Take what the tokens file says now; what it no longer says ends."""
        wanted = {credential.digest: credential for credential in credentials}
        for digest, caller in list(self._callers.items()):
            if digest not in self._own and wanted.get(digest) != caller.credential:
                log.info("a token of %r no longer holds", caller.subject)
                del self._callers[digest]
                caller.end()
        for digest, credential in wanted.items():
            self._callers.setdefault(digest, Caller(credential))
        self._expire()

    def _expire(self) -> None:
        """End the calls of tokens whose time is over, now and when the next one's is."""
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
            self._timer = asyncio.get_running_loop().call_later(min(*left, LOOK_AGAIN_S), self._expire)


class TrustInterceptor(grpc.aio.ServerInterceptor):
    """Takes whoever calls for one who may do everything: by the server's own socket, or where no token is asked for."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Let a call go its way."""
        callers.enter(callers.TRUSTED)
        return await continuation(handler_call_details)


class AuthenticationInterceptor(grpc.aio.ServerInterceptor):
    """Checks calls by their headers alone: a message could be large, and costs much more memory than it has bytes."""

    def __init__(self, authentication: Authentication) -> None:
        self._authentication = authentication
        self._refusals = RateLimitedLog(log)

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Let a call with the right token go its way as if this were not here; refuse any other."""
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        try:
            caller = self._authentication.authenticate(handler_call_details.invocation_metadata or ())
            authorization.check(method, caller.credential.scopes)
        except (AuthenticationError, AuthorizationError) as error:
            # On the wire every call is a stream of messages, and only one declared as such may end before it is read.
            if method.startswith(HEALTH):
                serialize = handler.response_serializer
                return grpc.stream_stream_rpc_method_handler(_health(handler), response_serializer=serialize)
            return grpc.stream_stream_rpc_method_handler(self._refusal(method, error))
        callers.enter(caller)
        if method != CONNECT and (task := asyncio.current_task()) is not None:
            # A worker's stream ends in a way of its own, which tells the worker why.
            caller.ends.add(task.cancel)
            task.add_done_callback(partial(_forget, caller, task.cancel))
        return handler

    def _refusal(self, method: str, error: AuthenticationError | AuthorizationError) -> Any:
        async def refuse(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
            self._refusals.info("refused %s to %s: %s", method, context.peer(), error.message)
            if method != CONNECT:
                raise error
            # In band, as all errors of that stream.
            close = worker_pb2.Close(reason=worker_pb2.CLOSE_REASON_UNAUTHENTICATED, message=error.message)
            yield worker_pb2.ConnectResponse(close=close).SerializeToString()
            # The worker hangs up when it has read that, which ends this; ending first could lose it.
            await asyncio.sleep(PEER_END_S)

        return refuse


def _forget(caller: Caller, end: Callable[[], object], task: asyncio.Task[Any]) -> None:
    caller.ends.discard(end)


def _health(handler: Any) -> Any:
    """Tell strangers of the server as a whole: which service they ask for is in what is not read."""

    async def tell(requests: AsyncIterator[bytes], context: Context) -> None:
        response = await (handler.unary_unary or handler.unary_stream)(health_pb2.HealthCheckRequest(), context)
        if response is not None:  # a watch writes by itself
            await context.write(response)

    return tell
