"""Owns who calls. Rule: a handler asks here, and nothing of who calls is taken from a request.

The caller is set before the handler runs, in the task in which it runs; without one, asking fails.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from lattice_server.core.errors import AuthenticationError, AuthorizationError
from lattice_server.core.tenancy import Reach
from lattice_server.rpc.convert.tasks import check_id
from lattice_server.tokens import Credential, Scope


@dataclass(slots=True, eq=False)
class Caller:
    """Who shows one credential, over any number of calls. Lives on the main thread.

    `ends` are called when the credential no longer holds: each ends one call that is open. A caller `is_trusted` when
    it needs no credential: it comes by the server's own socket, or the server asks nobody for a token.
    """

    credential: Credential
    is_trusted: bool = False
    is_over: bool = False
    ends: set[Callable[[], object]] = field(default_factory=set)

    @property
    def subject(self) -> str:
        """Who it is."""
        return self.credential.subject

    @property
    def reach(self) -> Reach:
        """Whose things it may name."""
        return Reach(self.credential.tenant, self.credential.is_any_tenant)

    def end(self) -> None:
        """End every call that is open."""
        self.is_over = True
        ends, self.ends = self.ends, set()
        for end in ends:
            end()


TRUSTED = Caller(Credential("", "", frozenset(Scope), is_any_tenant=True), is_trusted=True)
_current: ContextVar[Caller] = ContextVar("lattice_caller")


def enter(caller: Caller) -> None:
    """Note who makes the call that this task handles."""
    _current.set(caller)


def caller() -> Caller:
    """Return who makes the call that this task handles."""
    return _current.get()


def reach() -> Reach:
    """Return whose things the caller may name."""
    return _current.get().reach


def tenant_named(tenant: str) -> str:
    """Return the tenant a request is for: the caller's own when it names none. Raises AuthorizationError."""
    own = _current.get().reach
    if not tenant:
        return own.tenant
    check_id(tenant, "tenant")
    if not own.covers(tenant):
        # Of any other name alike: whether there is such a tenant is not said.
        raise AuthorizationError("PERMISSION_DENIED", f"this token is for tenant {own.tenant!r}, not {tenant!r}")
    return tenant


def no_longer_valid() -> AuthenticationError:
    """Return the error that ends a call whose token no longer holds."""
    return AuthenticationError("UNAUTHENTICATED", "the token is no longer valid here")
