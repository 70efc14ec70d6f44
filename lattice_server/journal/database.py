"""Owns the protocol of a database connection, and the SQL that SQLite and PostgreSQL share.

Rule: a statement is a constant with `?` for each value; nothing is put into its text.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

Row = tuple[Any, ...]


class Database(Protocol):
    """One connection, used by one thread at a time.

    Raises JournalDamagedError for a page that cannot be read, JournalFullError when the disk is full, and
    JournalBrokenError for all else.
    """

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[Row]:
        """Run a statement and return its rows."""

    def execute_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run a statement once for each row of values."""

    def transaction(self) -> AbstractContextManager[None]:
        """Return a context that is one transaction; an exception rolls it back."""

    def close(self) -> None:
        """Close the connection."""


# Columns of runs, in the order of `StoredRun` but for the summary, which is last.
RUN_COLUMNS = """number, tenant, run_id, accepted_s, fingerprint, request_id, ended_s, unread, sequence, kept_bytes,
    summary"""
WORKFLOW_COLUMNS = "number, tenant, workflow_id, revision, stored_s, fingerprint, definition"
