"""What every kind of journal does."""

import dataclasses

import pytest

from lattice_server.engine.recording.journal_port import JournalBrokenError, JournalDamagedError, JournalRetention
from lattice_server.engine.recording.journal_records import (
    DroppedRun,
    EventRecorded,
    ResultsRead,
    RunDeleted,
    StoredEvent,
    StoredWorkflow,
    TasksDefined,
    WorkflowDeleted,
    WorkflowStored,
)
from tests.server.journal.conftest import Journals
from tests.server.journal.listening import accepted, code, ended, event, store, whole

LARGE = 40_000  # More than a row takes.


def stored_workflow(number: int, revision: int = 1, **changes: object) -> WorkflowStored:
    record = WorkflowStored(number, "t", f"flow-{number}", revision, 5.0, "print", b"flow %d" % revision)
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


def test_commit_numbers_rise_and_all_are_told(journals: Journals) -> None:
    journal = journals.open()
    numbers = [journal.append([record]) for record in whole(1, events=50)]
    journals.listening.wait(numbers[-1])
    assert numbers == list(range(1, 53))
    assert journals.listening.numbers == sorted(journals.listening.numbers)
    assert journals.listening.number == 52


def test_live_run_is_read_back_with_all_it_was_accepted_with(journals: Journals) -> None:
    journal = journals.open()
    run = accepted(7, "t", request_id="r", code=(code("f"),), artifacts=("up",), definition=b"d" * LARGE)
    added = TasksDefined(7, b"more", (code("g", b"g" * LARGE),))
    store(journal, journals.listening, run, event(7, 1), added, event(7, 2, LARGE))
    with journal.reader() as reader:
        (found,) = reader.live_runs()
        assert (found.run, found.tenant, found.run_id, found.accepted_s) == (7, "t", "run-7", 1007.0)
        assert (found.fingerprint, found.request_id) == ("print-7", "r")
        assert (found.ended_s, found.sequence, found.damage) == (None, 2, "")
        assert reader.settings(7) == b"settings 7"
        assert list(reader.definitions(7)) == [b"d" * LARGE, b"more"]
        assert [item.body for item in reader.events(7)] == [event(7, 1).body, event(7, 2, LARGE).body]
        assert (reader.code("sha256:f"), reader.code("sha256:g")) == (b"f", b"g" * LARGE)
        assert reader.code("sha256:h") is None
        assert list(reader.artifacts()) == ["up"]
        assert reader.ended_runs() == []


def test_events_are_read_from_a_number_on(journals: Journals) -> None:
    journal = journals.open()
    records = [accepted(1), *(EventRecorded(1, n, b"%d" % n, b"r%d" % n) for n in range(1, 601))]
    store(journal, journals.listening, *records)
    with journal.reader() as reader:
        assert [item.sequence for item in reader.events(1)] == list(range(1, 601))
        assert list(reader.events(1, 598)) == [StoredEvent(599, b"599", b"r599"), StoredEvent(600, b"600", b"r600")]
        assert list(reader.events(1, 600)) == []


def test_ended_run_is_found_by_id_with_its_summary(journals: Journals) -> None:
    journal = journals.open()
    store(journal, journals.listening, *whole(1, "t", events=3), *whole(2, "u", run_id="run-1"))
    with journal.reader() as reader:
        found = reader.find("run-1", "t")
        assert found is not None
        assert (found.run, found.ended_s, found.sequence, found.summary) == (1, 2001.0, 3, b"summary 1")
        assert not found.is_read
        assert found.kept_bytes > 0
        assert reader.find("run-1", "") is None
        assert list(reader.live_runs()) == []
        assert len(list(reader.events(1))) == 3


def test_newest_run_is_found_when_an_id_was_used_again(journals: Journals) -> None:
    journal = journals.open()
    store(journal, journals.listening, *whole(1), *whole(2, run_id="run-1"))
    with journal.reader() as reader:
        found = reader.find("run-1", "")
        assert found is not None
        assert found.run == 2


def test_ended_runs_come_newest_first_by_page_and_tenant(journals: Journals) -> None:
    journal = journals.open()
    for run in range(1, 10):
        store(journal, journals.listening, *whole(run, "t" if run % 2 else "u"))
    store(journal, journals.listening, accepted(10, "t"))
    with journal.reader() as reader:
        assert [found.run for found in reader.ended_runs(limit=3)] == [9, 8, 7]
        assert [found.run for found in reader.ended_runs(limit=3, before=7)] == [6, 5, 4]
        assert [found.run for found in reader.ended_runs(tenant="t", before=9)] == [7, 5, 3, 1]
        assert reader.ended_runs(tenant="v") == []


def test_results_read_are_noted(journals: Journals) -> None:
    journal = journals.open()
    store(journal, journals.listening, *whole(1), ResultsRead(1))
    with journal.reader() as reader:
        assert reader.ended_runs()[0].is_read


def test_a_record_that_nothing_waits_for_is_written_with_the_next_ones(journals: Journals) -> None:
    journal = journals.open()
    store(journal, journals.listening, *whole(1))
    journal.append_later(ResultsRead(1))
    store(journal, journals.listening, *whole(2))
    with journal.reader() as reader:
        assert [(found.run, found.is_read) for found in reader.ended_runs()] == [(2, False), (1, True)]
    with pytest.raises(ValueError, match="has not ended"):
        journal.append_later(ResultsRead(3))


def test_stored_workflow_is_replaced_by_its_change_and_deleted(journals: Journals) -> None:
    journal = journals.open()
    first = stored_workflow(1, code=(code("f"), code("g")), artifacts=("a",))
    changed = stored_workflow(1, 2, code=(code("g"),), artifacts=("b",), definition=b"x" * LARGE)
    store(journal, journals.listening, first, stored_workflow(2))
    store(journal, journals.listening, changed)
    journals.listening.until(lambda: journals.listening.artifacts == ["a"])
    with journal.reader() as reader:
        one, two = reader.workflows()
        assert one == StoredWorkflow(1, "t", "flow-1", 2, 5.0, "print", b"x" * LARGE)
        assert two.definition == b"flow 1"
        assert (reader.code("sha256:f"), reader.code("sha256:g")) == (None, b"g")
    store(journal, journals.listening, WorkflowDeleted(1))
    journals.listening.until(lambda: journals.listening.artifacts == ["a", "b"])
    with journal.reader() as reader:
        assert [found.number for found in reader.workflows()] == [2]
        assert reader.code("sha256:g") is None


def test_deleted_run_leaves_nothing_that_only_it_used(journals: Journals) -> None:
    journal = journals.open()
    shared, own = code("shared", b"s" * LARGE), code("own", b"o" * LARGE)
    store(journal, journals.listening, *whole(1, events=700, code=(shared, own), artifacts=("both", "one")))
    store(journal, journals.listening, *whole(2, code=(shared,), artifacts=("both",)))
    store(journal, journals.listening, RunDeleted(1))
    journals.listening.until(lambda: journals.listening.artifacts)
    assert journals.listening.runs == [DroppedRun(1, "", "run-1", "print-1")]
    assert journals.listening.artifacts == ["one"]
    with journal.reader() as reader:
        assert reader.find("run-1", "") is None
        assert list(reader.events(1)) == []
        with pytest.raises(JournalDamagedError):
            list(reader.definitions(1))
        assert (reader.code("sha256:own"), reader.code("sha256:shared")) == (None, b"s" * LARGE)
        assert [found.run for found in reader.ended_runs()] == [2]


def test_deleting_a_run_twice_changes_nothing(journals: Journals) -> None:
    journal = journals.open()
    store(journal, journals.listening, *whole(1), RunDeleted(1))
    store(journal, journals.listening, RunDeleted(1), ResultsRead(1))
    assert [run.run for run in journals.listening.runs] == [1]


def test_large_value_that_is_used_again_in_the_same_commit_stays(journals: Journals) -> None:
    journal = journals.open()
    store(journal, journals.listening, *whole(1, definition=b"d" * LARGE, code=(code("f"),)))
    store(journal, journals.listening, RunDeleted(1), *whole(2, definition=b"d" * LARGE, code=(code("f"),)))
    store(journal, journals.listening, *whole(3))
    with journal.reader() as reader:
        assert list(reader.definitions(2)) == [b"d" * LARGE]
        assert reader.code("sha256:f") == b"f"


@pytest.mark.parametrize(
    "records",
    [
        [event(1, 3)],
        [event(1, 1)],
        [event(2, 1)],
        [accepted(1)],
        [TasksDefined(9, b"")],
        [ended(9)],
        [RunDeleted(1)],
        [ResultsRead(1)],
        [RunDeleted(9)],
        [accepted(2), event(2, 1), event(2, 3)],
        [ended(1), event(1, 2)],
        [ended(1), ended(1)],
    ],
)
def test_records_out_of_order_are_refused_as_a_whole(journals: Journals, records: list[EventRecorded]) -> None:
    journal = journals.open()
    store(journal, journals.listening, accepted(1), event(1, 1))
    with pytest.raises(ValueError, match="run"):
        journal.append(records)
    store(journal, journals.listening, event(1, 2), *whole(2))
    with journal.reader() as reader:
        assert len(list(reader.events(1))) == 2
        assert reader.find("run-2", "") is not None


def test_retention_deletes_read_results_first_then_the_oldest(journals: Journals) -> None:
    journal = journals.open(JournalRetention(runs=3))
    for run in (1, 2, 3):
        store(journal, journals.listening, *whole(run, "t"))
    store(journal, journals.listening, *whole(4, "u"), ResultsRead(2))
    for run, victim in ((5, 2), (6, 1)):
        store(journal, journals.listening, *whole(run, "t"))
        journals.listening.until(lambda victim=victim: victim in [gone.run for gone in journals.listening.runs])
    with journal.reader() as reader:
        assert [found.run for found in reader.ended_runs()] == [6, 5, 4, 3]


def test_retention_bounds_the_bytes_of_each_tenant_but_keeps_its_newest_run(journals: Journals) -> None:
    journal = journals.open(JournalRetention(kept_bytes=100_000))
    store(journal, journals.listening, *whole(1, "u", events=1, size=LARGE))
    for run in range(2, 6):
        store(journal, journals.listening, *whole(run, "t", events=1, size=LARGE))
    store(journal, journals.listening, *whole(6, "v", events=10, size=LARGE))
    with journal.reader() as reader:
        assert [found.run for found in reader.ended_runs()] == [6, 5, 4, 1]


def test_retention_deletes_runs_that_ended_too_long_ago(journals: Journals) -> None:
    journal = journals.open(JournalRetention(age_s=100.0))
    store(journal, journals.listening, accepted(1, "t"), ended(1, 5000.0), accepted(2, "t"), ended(2, 5050.0))
    store(journal, journals.listening, accepted(3, "u"), ended(3, 5120.0))
    with journal.reader() as reader:
        assert [found.run for found in reader.ended_runs()] == [3, 2]


def test_live_run_is_never_deleted_by_retention(journals: Journals) -> None:
    journal = journals.open(JournalRetention(age_s=1.0, runs=1, kept_bytes=1))
    store(journal, journals.listening, accepted(1), event(1, 1, LARGE), *whole(2), *whole(3))
    with journal.reader() as reader:
        assert [found.run for found in reader.live_runs()] == [1]
        assert [found.run for found in reader.ended_runs()] == [3]


def test_stats_count_runs(journals: Journals) -> None:
    journal = journals.open()
    store(journal, journals.listening, *whole(1), *whole(2), accepted(3))
    found = journal.stats()
    assert (found.live_runs, found.ended_runs, found.pending_bytes) == (1, 2, 0)


def test_closed_journal_takes_nothing(journals: Journals) -> None:
    journal = journals.open()
    journals.close()
    with pytest.raises(JournalBrokenError, match="closed"):
        journal.append([accepted(1)])


def test_everything_is_there_when_opened_again(durable: Journals) -> None:
    journal = durable.open()
    assert (journal.epoch, journal.last_run, journal.last_workflow) == (1, 0, 0)
    store(journal, durable.listening, *whole(1, events=3), stored_workflow(4), accepted(2, artifacts=("a",)))
    journal.append([event(2, 1), event(2, 2)])
    journal = durable.open()
    assert (journal.epoch, journal.last_run, journal.last_workflow) == (2, 2, 4)
    with pytest.raises(ValueError, match="does not follow"):
        journal.append([event(2, 2)])
    store(journal, durable.listening, TasksDefined(2, b"more"), event(2, 3), ended(2))
    with journal.reader() as reader:
        assert [item.sequence for item in reader.events(2)] == [1, 2, 3]
        assert list(reader.definitions(2)) == [b"definition 2", b"more"]
        assert [found.run for found in reader.ended_runs()] == [2, 1]
        assert [found.number for found in reader.workflows()] == [4]


def test_numbers_of_deleted_runs_and_workflows_are_not_given_out_again(durable: Journals) -> None:
    journal = durable.open()
    store(journal, durable.listening, *whole(5), stored_workflow(3))
    store(journal, durable.listening, RunDeleted(5), WorkflowDeleted(3))
    journal = durable.open()
    assert (journal.last_run, journal.last_workflow) == (5, 3)


def test_retention_goes_on_counting_when_opened_again(durable: Journals) -> None:
    journal = durable.open(JournalRetention(runs=2))
    store(journal, durable.listening, *whole(1), *whole(2))
    journal = durable.open(JournalRetention(runs=2))
    store(journal, durable.listening, *whole(3))
    with journal.reader() as reader:
        assert [found.run for found in reader.ended_runs()] == [3, 2]
