"""Owns the identity of callers. Rule: it comes from the credential alone, never from a request.

An interceptor sets the caller in the task of the handler before the handler runs; without it, `caller` fails.
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
    """The caller with one credential, over any number of calls. Lives on the main thread.

    `ends` are called when the credential is no longer valid: each ends one open call. A caller `is_trusted` when it
    needs no credential: it comes by the server's own socket, or the server has no tokens.
    """

    credential: Credential
    is_trusted: bool = False
    is_over: bool = False
    ends: set[Callable[[], object]] = field(default_factory=set)

    @property
    def subject(self) -> str:
        """The subject of the credential."""
        return self.credential.subject

    @property
    def reach(self) -> Reach:
        """The tenants whose runs, workflows and artifacts the caller may name."""
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
    """Set the caller of the call that this task handles."""
    _current.set(caller)


def caller() -> Caller:
    """Return the caller of the call that this task handles."""
    return _current.get()


def reach() -> Reach:
    """Return the reach of the caller."""
    return _current.get().reach


def tenant_named(tenant: str) -> str:
    """Return the tenant of a request: the caller's own when it names none. Raises AuthorizationError."""
    own = _current.get().reach
    if not tenant:
        return own.tenant
    check_id(tenant, "tenant")
    if not own.covers(tenant):
        # The same for every other name: the answer must not show which tenants exist.
        raise AuthorizationError("PERMISSION_DENIED", f"this token is for tenant {own.tenant!r}, not {tenant!r}")
    return tenant


def no_longer_valid() -> AuthenticationError:
    """Return the error that ends a call whose token is no longer valid."""
    return AuthenticationError("UNAUTHENTICATED", "the token is no longer valid here")
