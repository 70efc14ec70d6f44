"""Owns the errors of requests. Rule: one class per kind, one stable reason per case.

The failure of a user's task is no exception: it is a `Failure`.
"""

from collections.abc import Mapping, Sequence

from lattice_server.core.frozen import frozen


@frozen
class FieldViolation:
    """An invalid field of a request, such as `workflow.tasks[3].inputs["x"]`."""

    field: str
    description: str


class LatticeError(Exception):
    """Base of the errors of requests. `reason` is the name of an `ErrorReason` without its prefix."""

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s


class InvalidError(LatticeError):
    """The request is malformed; a retry cannot succeed."""


class NotFoundError(LatticeError):
    """The resource does not exist."""


class ConflictError(LatticeError):
    """The id is used with other content."""


class PreconditionError(LatticeError):
    """The request is fine and the server's state does not allow it."""


class AbortedError(LatticeError):
    """Another request changed the resource first."""


class RangeError(LatticeError):
    """A cursor is outside of the retained range."""


class ExhaustedError(LatticeError):
    """A limit is reached; `retry_after_s` says when to try again, if ever."""


class UnavailableError(LatticeError):
    """The server cannot serve now."""


class AuthenticationError(LatticeError):
    """The caller has no valid credential."""


class AuthorizationError(LatticeError):
    """The caller is known and may not do this."""


def invalid_field(field: str, description: str) -> InvalidError:
    """Return the error for one bad field of a request."""
    return InvalidError("INVALID_FIELD", f"{field}: {description}", violations=[FieldViolation(field, description)])
