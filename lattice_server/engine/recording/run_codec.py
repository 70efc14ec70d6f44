"""Owns the protocol by which runs and workflows become bytes of a journal, and the data that is read back.

Rule: the engine does not know the encoding; see `rpc/convert/journal.py`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from lattice_server.core.frozen import frozen
from lattice_server.core.messages import RunEvent
from lattice_server.core.model import Function, Payload, TaskSpec, WorkflowSpec
from lattice_server.core.steps import Steps
from lattice_server.engine.recording.journal_records import Code
from lattice_server.engine.runs.entry import RunEntry

# Returns recorded code by its digest.
ReadCode = Callable[[str], bytes]


@frozen
class RunSettings:
    """How a recorded run was started; see `RunEntry`."""

    labels: Mapping[str, str]
    priority: int
    workflow_id: str
    timeout_s: float | None
    parameters: Mapping[str, Payload]
    retried_run_id: str
    is_open: bool
    disconnect_grace_s: float | None


@frozen
class RecordedEvent:
    """An event that was read back.

    `happened_s` is when a task started or ended, which may be before the event. `queued_s` is how long a task that has
    ended was queued. A start has the lease of the attempt, and its position in it. `is_called` tells that a task called
    the tasks that it added.
    """

    event: RunEvent
    happened_s: float
    queued_s: float | None
    lease_id: str
    item: int
    is_called: bool


class RunCodec(Protocol):
    """Encodes and decodes. Decoding raises ValueError or LatticeError for invalid bytes."""

    def settings(self, entry: RunEntry, parameters: Mapping[str, Payload]) -> bytes:
        """Return the settings of a run that is being accepted."""

    def workflow(self, spec: WorkflowSpec) -> Steps[bytes]:
        """Return the definition of a run's workflow, in steps."""

    def tasks(self, tasks: Sequence[TaskSpec]) -> Steps[bytes]:
        """Return the definition of tasks, in steps."""

    def event(self, entry: RunEntry, event: RunEvent) -> tuple[bytes, bytes]:
        """Return an event, and the data that only a restart needs."""

    def summary(self, entry: RunEntry) -> bytes:
        """Return a run that has ended, as lists show it."""

    def stored(self, definition: object) -> bytes:
        """Return the definition of a stored workflow."""

    def code(self, functions: Iterable[Function]) -> tuple[Code, ...]:
        """Return the code of functions and of their bundles."""

    def read_settings(self, data: bytes) -> RunSettings:
        """Return the settings of a run."""

    def read_workflow(self, data: bytes, code: ReadCode) -> Steps[WorkflowSpec]:
        """Return the workflow of a run, or added tasks as a workflow, in steps."""

    def read_event(self, key: str, body: bytes, replay: bytes) -> RecordedEvent:
        """Return an event of the run with this key."""

    def read_stored(self, data: bytes, code: ReadCode) -> tuple[object, WorkflowSpec, dict[str, Function]]:
        """Return the definition of a stored workflow, its workflow, and its functions by name."""
