"""A process that fills the disk of its journal: `python -m tests.server.journal.filling FOLDER`."""

import sys
import time
from pathlib import Path

from lattice_server.engine.recording.journal_port import JournalFullError
from lattice_server.engine.recording.journal_records import RunDeleted
from lattice_server.journal.sqlite import SqliteSettings, open_sqlite
from tests.server.journal.listening import Listening, accepted, ended, event, store, whole

MIB = 1024 * 1024


def main(folder: Path) -> None:
    """Fill the disk, end the running work, make room, and accept new work again."""
    listening = Listening()
    settings = SqliteSettings(reserve_bytes=8 * MIB, checkpoint_bytes=MIB, vacuum_pages=8)
    journal = open_sqlite(folder / "journal", listening, settings)
    # A live run, and a large one that has ended.
    store(journal, listening, accepted(1), *whole(2, events=50, size=250_000))
    sequence = 0
    try:
        while True:
            sequence += 1
            listening.wait(journal.admit([event(1, sequence, 200_000)]))
    except JournalFullError:
        print("full")
    # The events of running work are taken also where the disk has no room but the reserve.
    for more in range(sequence, sequence + 30):
        store(journal, listening, event(1, more, 200_000))
    store(journal, listening, ended(1))
    print("ended")
    store(journal, listening, RunDeleted(2))
    deadline = time.monotonic() + 30.0
    run = 3
    while time.monotonic() < deadline:
        try:
            listening.wait(journal.admit(whole(run)))
        except JournalFullError:
            time.sleep(0.01)
            store(journal, listening, RunDeleted(2))
            continue
        print("room again")
        break
    with journal.reader() as reader:
        assert len(list(reader.events(1))) == sequence + 29
    journal.close()
    assert listening.error is None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
