"""Owns the identity of callers. Rule: it comes from the credential alone, never from a request.

A caller that reaches several tenants may say in the header `lattice-tenant` which one of them a call is about. The call
then finds nothing of the others.
An interceptor sets the caller in the task of the handler before the handler runs; without it, `caller` fails.
"""

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from urllib.parse import unquote

from lattice_server.core.errors import AuthenticationError, AuthorizationError
from lattice_server.core.tenancy import Reach
from lattice_server.rpc.convert.tasks import check_id
from lattice_server.tokens import Credential, Scope

# The name of a tenant in UTF-8, percent-encoded, because headers are ASCII.
TENANT_HEADER = "lattice-tenant"

Metadata = Iterable[tuple[str, str | bytes]]


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
_tenant: ContextVar[str] = ContextVar("lattice_tenant", default="")


def enter(caller: Caller, headers: Metadata = ()) -> None:
    """Set the caller of the call that this task handles, and the tenant that the call is about."""
    _current.set(caller)
    for key, value in headers:
        if key == TENANT_HEADER and isinstance(value, str):
            _tenant.set(unquote(value))


def caller() -> Caller:
    """Return the caller of the call that this task handles."""
    return _current.get()


def reach() -> Reach:
    """Return the tenants that the call may name: the one in its header, or else those of the caller.

    Raises AuthorizationError, InvalidError.
    """
    tenant, own = _tenant.get(), _current.get().reach
    return Reach(_covered(tenant, own, TENANT_HEADER)) if tenant else own


def tenant_named(tenant: str) -> str:
    """Return the tenant of a request: that of the call when it names none. Raises AuthorizationError, InvalidError."""
    own = reach()
    return _covered(tenant, own, "tenant") if tenant else own.tenant


def _covered(tenant: str, own: Reach, field: str) -> str:
    check_id(tenant, field)
    if not own.covers(tenant):
        # The same for every other name: the answer must not show which tenants exist.
        raise AuthorizationError("PERMISSION_DENIED", f"this call is for tenant {own.tenant!r}, not {tenant!r}")
    return tenant


def no_longer_valid() -> AuthenticationError:
    """Return the error that ends a call whose token is no longer valid."""
    return AuthenticationError("UNAUTHENTICATED", "the token is no longer valid here")
