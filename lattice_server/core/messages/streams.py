"""Owns the messages about the streamed output of tasks, and about how far tasks are."""

from lattice_server.core.frozen import frozen
from lattice_server.core.messages.tasks import AttemptMessage
from lattice_server.core.messages.workers import AttemptReport
from lattice_server.core.model import Failure, Payload


@frozen
class AttemptStreamed(AttemptReport):
    """An attempt streams chunks. A `refusal` says why its report is invalid."""

    chunks: tuple[Payload, ...]
    refusal: Failure | None = None


@frozen
class AttemptProgressed(AttemptReport):
    """An attempt says that `done` of `total` are done; None for a total that it does not know."""

    done: float
    total: float | None


@frozen
class TaskStreamed(AttemptMessage):
    """An attempt at a task streams chunks."""

    chunks: tuple[Payload, ...]


@frozen
class TaskProgressed(AttemptMessage):
    """An attempt at a task says how far it is; see `AttemptProgressed`."""

    done: float
    total: float | None
