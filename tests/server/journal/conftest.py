"""Every kind of journal, to be opened again and again by a test."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pytest

from lattice_server.engine.recording.journal_port import Journal, JournalRetention
from lattice_server.journal.postgres import PostgresSettings, open_postgres
from lattice_server.journal.sqlite import SqliteSettings, open_sqlite
from tests.server.journal.listening import Listening
from tests.server.journal.memory import MemoryJournal
from tests.server.journal.postgres_server import PostgresServer, running_postgres

# The kills of `make test`; `make test-all` has those at all points.
KILLS = frozenset({"commit.before_commit", "commit.after_commit", "chores.after_delete"})


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as exhaustive the tests that need PostgreSQL, and most of the tests that kill a process."""
    for item in items:
        if item.path.parent != Path(__file__).parent:
            continue
        values = set(map(str, item.callspec.params.values())) if hasattr(item, "callspec") else set()
        is_kill = item.path.name == "test_crashes.py" and not (values and values <= KILLS)
        if "postgres" in values or item.path.name == "test_postgres.py" or is_kill:
            item.add_marker(pytest.mark.exhaustive)


Open = Callable[[Listening, JournalRetention], Journal]


@dataclass
class Journals:
    """Opens the same journal again; every one is closed in the end."""

    opening: Open
    listening: Listening = field(default_factory=Listening)
    opened: list[Journal] = field(default_factory=list)

    def open(self, retention: JournalRetention | None = None) -> Journal:
        """Close the journal that is open and open it again, with a new listener."""
        self.close()
        self.listening = Listening()
        journal = self.opening(self.listening, retention or JournalRetention())
        self.opened.append(journal)
        return journal

    def close(self) -> None:
        """Close the journal that is open."""
        while self.opened:
            self.opened.pop().close()


def sqlite(folder: Path) -> Open:
    return lambda listening, retention: open_sqlite(folder, listening, SqliteSettings(retention=retention))


def postgres(database: str) -> Open:
    schema = f"journal_{uuid4().hex}"
    return lambda listening, retention: open_postgres(listening, PostgresSettings(database, schema, retention))


def opening(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Return how the kind of journal that a fixture is asked for is opened."""
    if request.param == "postgres":
        return postgres(request.getfixturevalue("postgres_server").database)
    return MemoryJournal if request.param == "memory" else sqlite(tmp_path / "journal")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A PostgreSQL that runs until the tests have ended."""
    with running_postgres() as found:
        yield found


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def journals(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Journals]:
    """One kind of journal after the other."""
    found = Journals(opening(request, tmp_path))
    yield found
    found.close()


@pytest.fixture(params=["sqlite", "postgres"])
def durable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Journals]:
    """One kind of journal that forgets nothing after the other."""
    found = Journals(opening(request, tmp_path))
    yield found
    found.close()
