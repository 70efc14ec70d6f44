"""Owns the table of uses: which runs, workflows and code use which code, files and artifacts.

Rule: a used thing is deleted with its last use. Its name is `code:` and a digest, `file:` and the digest of a value in
a file, or `artifact:` and an id. Users are `run:` and `workflow:` with a number, and code by its name.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from lattice_server.engine.recording.journal_records import DroppedRun
from lattice_server.journal.database import Database, Row

ALL = 1_000_000_000


@dataclass(slots=True)
class Changes:
    """Consequences of a transaction, once it is committed: files to delete, and runs and artifacts that are dropped."""

    files: list[str] = field(default_factory=list)
    runs: list[DroppedRun] = field(default_factory=list)
    artifacts: list[str] = field(default_factory=list)


def run_user(run: int) -> str:
    """Return the name of a run as a user."""
    return f"run:{run}"


def workflow_user(number: int) -> str:
    """Return the name of a stored workflow as a user."""
    return f"workflow:{number}"


class Uses:
    """The table `uses`; inside of transactions of `database`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, rows: list[Row]) -> None:
        """Note users and names that they use; those noted before stay."""
        if rows:
            self._database.execute_many('INSERT INTO uses ("user", name) VALUES (?, ?) ON CONFLICT DO NOTHING', rows)

    def names(self, user: str, limit: int = ALL) -> list[str]:
        """Return the names that a user uses."""
        sql = 'SELECT name FROM uses WHERE "user" = ? LIMIT ?'
        return [name for (name,) in self._database.execute(sql, (user, limit))]

    def is_used(self, name: str) -> bool:
        """Whether anything uses a name."""
        return bool(self._database.execute("SELECT 1 FROM uses WHERE name = ? LIMIT 1", (name,)))

    def drop(self, user: str, names: Iterable[str], changes: Changes) -> None:
        """Remove uses of a user; drop the names without any other use."""
        for name in names:
            self._database.execute('DELETE FROM uses WHERE "user" = ? AND name = ?', (user, name))
            if self.is_used(name):
                continue
            kind, _, rest = name.partition(":")
            if kind == "file":
                changes.files.append(rest)
            elif kind == "artifact":
                changes.artifacts.append(rest)
            else:
                self._database.execute("DELETE FROM code WHERE digest = ?", (rest,))
                self.drop(name, self.names(name), changes)

    def settle(self, changes: Changes) -> None:
        """Remove names from the changes that have been used again since."""
        changes.files = [digest for digest in changes.files if not self.is_used(f"file:{digest}")]
        changes.artifacts = [name for name in changes.artifacts if not self.is_used(f"artifact:{name}")]
