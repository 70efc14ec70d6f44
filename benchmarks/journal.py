"""`python -m benchmarks.journal`: measures the latency of a commit, and how many events a journal writes and reads."""

import argparse
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lattice_server.engine.recording.journal_port import Journal, JournalError
from lattice_server.engine.recording.journal_records import DroppedRun, EventRecorded, RunAccepted, RunEnded
from lattice_server.journal.sqlite import SqliteSettings, Sync, open_sqlite

BODY = b"e" * 180
COMMITS = 1_000
EVENTS = 100_000
RUNS = 5_000
WAIT_S = 120.0


class Waiting:
    """Waits for commits."""

    def __init__(self) -> None:
        self._number = 0
        self._changed = threading.Condition()

    def durable(self, number: int) -> None:
        """See `JournalListener`."""
        with self._changed:
            self._number = number
            self._changed.notify()

    def failed(self, error: JournalError) -> None:
        """See `JournalListener`."""
        raise error

    def dropped(self, runs: Sequence[DroppedRun], artifacts: Sequence[str]) -> None:
        """See `JournalListener`."""

    def wait(self, number: int) -> None:
        """Wait until a commit is durable."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._number >= number, WAIT_S):
                raise TimeoutError(f"commit {number} is not durable after {WAIT_S} s")


def accepted(run: int) -> RunAccepted:
    """Return a run of a small workflow."""
    return RunAccepted(run, "tenant", f"run-{run}", 0.0, "p" * 64, "", b"s" * 100, b"d" * 600)


def measure(name: str, opening: Callable[[Waiting], Journal]) -> None:
    """Measure one kind of journal, and print a row of the table."""
    waiting = Waiting()
    journal = opening(waiting)
    waiting.wait(journal.append([accepted(1)]))
    latencies = sorted(_commit(journal, waiting, sequence) for sequence in range(1, COMMITS + 1))
    start, start_cpu = time.perf_counter(), time.process_time()
    number = 0
    for sequence in range(COMMITS + 1, COMMITS + EVENTS + 1):
        number = journal.append([EventRecorded(1, sequence, BODY)])
    waiting.wait(number)
    events_s = EVENTS / (time.perf_counter() - start)
    cpu_us = (time.process_time() - start_cpu) / EVENTS * 1e6
    start = time.perf_counter()
    for run in range(2, RUNS + 2):
        journal.append([accepted(run), EventRecorded(run, 1, BODY)])
        journal.append([EventRecorded(run, 2, BODY)])
        number = journal.append([EventRecorded(run, 3, BODY), EventRecorded(run, 4, BODY), RunEnded(run, 1.0, BODY)])
    waiting.wait(number)
    runs_s = RUNS / (time.perf_counter() - start)
    start = time.perf_counter()
    with journal.reader() as reader:
        read = sum(1 for _ in reader.events(1))
    read_s = read / (time.perf_counter() - start)
    journal.close()
    p50, p99 = latencies[COMMITS // 2], latencies[COMMITS * 99 // 100]
    times = f"{p50 * 1e3:.2f} ms | {p99 * 1e3:.2f} ms | {events_s:,.0f} | {cpu_us:.1f}"
    print(f"| {name} | {times} | {runs_s:,.0f} | {read_s:,.0f} |")


def _commit(journal: Journal, waiting: Waiting, sequence: int) -> float:
    start = time.perf_counter()
    waiting.wait(journal.append([EventRecorded(1, sequence, BODY)]))
    return time.perf_counter() - start


def main() -> None:
    """Measure every kind."""
    parser = argparse.ArgumentParser(prog="benchmarks.journal")
    parser.add_argument("--folder", type=Path, help="where the files are written; by default a temporary folder")
    parser.add_argument("--postgres", help="a connection string of libpq; the schema `benchmark` is replaced")
    flags = parser.parse_args()
    print("| journal | commit, p50 | p99 | events/s | CPU µs an event | runs of 4 events/s | events read/s |")
    print("|---|---|---|---|---|---|---|")
    for sync in Sync:
        with tempfile.TemporaryDirectory(prefix="lattice-journal-", dir=flags.folder) as folder:
            settings = SqliteSettings(sync=sync)
            measure(
                f"sqlite, {sync.value.lower()}",
                lambda waiting, folder=folder, settings=settings: open_sqlite(Path(folder), waiting, settings),  # type: ignore[misc]
            )
    if flags.postgres:
        import psycopg

        from lattice_server.journal.postgres import PostgresSettings, open_postgres

        with psycopg.connect(flags.postgres, autocommit=True) as connection:
            connection.execute("DROP SCHEMA IF EXISTS benchmark CASCADE")
        measure("postgres", lambda waiting: open_postgres(waiting, PostgresSettings(flags.postgres, "benchmark")))


if __name__ == "__main__":
    main()
