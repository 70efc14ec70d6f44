"""Owns the errors the server answers with. Rule: one class per kind, one stable reason per case.

A user's task that fails is never one of these: it is a `Failure`, which is data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """What is wrong with one field of a request, such as `workflow.tasks[3].inputs["x"]`."""

    field: str
    description: str


class LatticeError(Exception):
    """Base of everything the server refuses. `reason` is the name of an `ErrorReason` without its prefix."""

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
    """The request is malformed; sending it again cannot help."""


class NotFoundError(LatticeError):
    """The thing named does not exist."""


class ConflictError(LatticeError):
    """The id exists with other content."""


class PreconditionError(LatticeError):
    """The request is fine and the server's state does not allow it."""


class AbortedError(LatticeError):
    """Somebody else changed the thing first."""


class RangeError(LatticeError):
    """A cursor lies outside what is kept."""


class ExhaustedError(LatticeError):
    """A limit is reached; `retry_after_s` says when to try again, if ever."""


class UnavailableError(LatticeError):
    """The server cannot serve now."""


class AuthenticationError(LatticeError):
    """The caller does not show who it is."""


class AuthorizationError(LatticeError):
    """The caller is known and may not do this."""


def invalid_field(field: str, description: str) -> InvalidError:
    """Return the error for one bad field of a request."""
    return InvalidError("INVALID_FIELD", f"{field}: {description}", violations=[FieldViolation(field, description)])
