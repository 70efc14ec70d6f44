"""Journals of earlier versions: each is opened with all that it has.

`python -m tests.server.journal.test_migrations VERSION` makes the fixture of the version that is checked out.
"""

import shutil
import sys
from pathlib import Path

import pytest

from lattice_server.engine.recording.journal_records import TasksDefined, WorkflowStored
from lattice_server.journal.sqlite import open_sqlite
from lattice_server.journal.sqlite_schema import MIGRATIONS
from tests.server.journal.listening import Listening, accepted, code, ended, event, store, whole

FIXTURES = Path(__file__).parent / "fixtures"
LARGE = 40_000


def make(folder: Path) -> None:
    """Write the journal that the test expects."""
    listening = Listening()
    journal = open_sqlite(folder, listening)
    store(journal, listening, *whole(1, "t", events=5, code=(code("f"),)))
    store(journal, listening, accepted(2, artifacts=("up",), code=(code("g", b"g" * LARGE),)), event(2, 1))
    store(journal, listening, TasksDefined(2, b"more"), event(2, 2, LARGE))
    store(journal, listening, WorkflowStored(3, "t", "flow", 2, 5.0, "print", b"flow", (code("f"),)))
    journal.close()
    for name in ("lock", "reserve"):
        (folder / name).unlink()


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS) + 1))
def test_journal_of_an_earlier_version_is_opened_with_all_it_has(version: int, tmp_path: Path) -> None:
    folder, listening = tmp_path / "journal", Listening()
    shutil.copytree(FIXTURES / f"version-{version}", folder)
    journal = open_sqlite(folder, listening)
    assert (journal.epoch, journal.last_run, journal.last_workflow) == (2, 2, 3)
    store(journal, listening, event(2, 3), ended(2), *whole(3))
    with journal.reader() as reader:
        assert [run.run for run in reader.ended_runs()] == [3, 2, 1]
        assert [item.body for item in reader.events(1)] == [event(1, n).body for n in range(1, 6)]
        assert [item.body for item in reader.events(2)] == [event(2, 1).body, event(2, 2, LARGE).body, event(2, 3).body]
        assert list(reader.definitions(2)) == [b"definition 2", b"more"]
        assert reader.settings(2) == b"settings 2"
        assert (reader.code("sha256:f"), reader.code("sha256:g")) == (b"f", b"g" * LARGE)
        assert list(reader.artifacts()) == ["up"]
        (workflow,) = reader.workflows()
        assert (workflow.workflow_id, workflow.revision, workflow.definition) == ("flow", 2, b"flow")
    journal.close()


if __name__ == "__main__":
    make(FIXTURES / f"version-{sys.argv[1]}")
