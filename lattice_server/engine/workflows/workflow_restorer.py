"""Makes the stored workflows again from the journal. Rule: one that cannot be read does not stop the others."""

import logging

from lattice_server.core.errors import LatticeError
from lattice_server.engine.recording.journal_port import JournalDamagedError, JournalReader
from lattice_server.engine.recording.run_journal import RunJournal
from lattice_server.engine.workflows.workflow_store import WorkflowStore

log = logging.getLogger(__name__)


def restore_workflows(library: WorkflowStore, journal: RunJournal) -> None:
    """Restore all stored workflows, before the server takes requests."""
    with journal.journal.reader() as reader:
        for stored in list(reader.workflows()):
            try:
                if stored.damage:
                    raise JournalDamagedError(stored.damage)
                read = journal.codec.read_stored(stored.definition, lambda digest: code_of(reader, digest))
                library.restore(stored, *read)
            except (JournalDamagedError, LatticeError, ValueError) as error:
                log.error("workflow %r cannot be restored: %s", stored.workflow_id, error)


def code_of(reader: JournalReader, digest: str) -> bytes:
    """Return recorded code. Raises JournalDamagedError when it is missing."""
    code = reader.code(digest)
    if code is None:
        raise JournalDamagedError(f"code {digest} is missing")
    return code
