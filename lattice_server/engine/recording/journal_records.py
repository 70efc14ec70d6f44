"""Owns the records that the engine writes to a journal and reads back. Rule: all of them are plain data.

Definitions, events and summaries are messages of the contract, encoded deterministically. A journal stores these bytes
and never parses them. A run goes by its number, which the engine gives out in rising order and never twice.
"""

from collections.abc import Callable

from lattice_server.core.frozen import frozen


@frozen
class Code:
    """A function or a bundle that a definition names by `digest`.

    The journal calls `encode`, on its own thread, only when it does not have the code yet. `size_bytes` is about what
    that returns.
    """

    digest: str
    size_bytes: int
    encode: Callable[[], bytes]


@frozen
class RunAccepted:
    """A run was accepted, at `accepted_s` in seconds since the epoch.

    `settings` is the run as it was accepted, with its parameters. `definition` is its workflow, with code named by
    digest. `artifacts` are the ids of the uploads that either of them names.
    """

    run: int
    tenant: str
    run_id: str
    accepted_s: float
    fingerprint: str
    request_id: str
    settings: bytes
    definition: bytes
    code: tuple[Code, ...] = ()
    artifacts: tuple[str, ...] = ()


@frozen
class TasksDefined:
    """Tasks were added to a run, by its caller or by one of its tasks."""

    run: int
    definition: bytes
    code: tuple[Code, ...] = ()
    artifacts: tuple[str, ...] = ()


@frozen
class EventRecorded:
    """A run has a new event; `sequence` is dense from 1.

    `body` is for readers. `replay` has additional data that only a restart needs, such as the lease of an attempt.
    """

    run: int
    sequence: int
    body: bytes
    replay: bytes = b""
    artifacts: tuple[str, ...] = ()


@frozen
class RunEnded:
    """A run ended at `ended_s`. `summary` is the run as lists show it."""

    run: int
    ended_s: float
    summary: bytes


@frozen
class ResultsRead:
    """A caller was given the results of a run. It is among the first that retention deletes."""

    run: int


@frozen
class RunDeleted:
    """An ended run is to be deleted, with the code, values and artifacts that only this run uses."""

    run: int


@frozen
class WorkflowStored:
    """A workflow was stored or changed. Its `number` stays the same over all changes."""

    number: int
    tenant: str
    workflow_id: str
    revision: int
    stored_s: float
    fingerprint: str
    definition: bytes
    code: tuple[Code, ...] = ()
    artifacts: tuple[str, ...] = ()


@frozen
class WorkflowDeleted:
    """A stored workflow was deleted."""

    number: int


Record = (
    RunAccepted | TasksDefined | EventRecorded | RunEnded | ResultsRead | RunDeleted | WorkflowStored | WorkflowDeleted
)


@frozen
class StoredRun:
    """A run as the journal has it. `ended_s` is None for a run that has not ended.

    `sequence` is the number of its newest event. `kept_bytes` is the size of all its records, once it has ended.
    `damage` says why the summary or the events cannot be read; it is empty for an undamaged row.
    """

    run: int
    tenant: str
    run_id: str
    accepted_s: float
    fingerprint: str
    request_id: str
    ended_s: float | None
    is_read: bool
    sequence: int
    kept_bytes: int
    summary: bytes
    damage: str = ""


@frozen
class StoredEvent:
    """One event of a run; see `EventRecorded`."""

    sequence: int
    body: bytes
    replay: bytes


@frozen
class StoredWorkflow:
    """A stored workflow; see `WorkflowStored`. `damage` says why its definition cannot be read."""

    number: int
    tenant: str
    workflow_id: str
    revision: int
    stored_s: float
    fingerprint: str
    definition: bytes
    damage: str = ""


@frozen
class DroppedRun:
    """A run that was deleted."""

    run: int
    tenant: str
    run_id: str
    fingerprint: str
