"""The leases of a worker: slots and reports by examples, and random histories checked after each step."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lattice_worker.session.lease_machine import LeaseMachine
from lattice_worker.session.report_queue import ReportQueue
from lattice_worker.session.slots import LeaseState, SlotTable
from tests.examples import share


def test_slots_run_their_leases_in_order_and_side_by_side() -> None:
    slots: SlotTable[str] = SlotTable()
    assert slots.add("a", 1, "work a") == "work a"
    assert slots.add("b", 1, "work b") is None
    assert slots.add("c", 1, "work c") is None
    assert slots.add("d", 2, "work d") == "work d"
    assert slots.leases() == ["a", "b", "c", "d"]
    assert [slots.state(name) for name in "abcd"].count(LeaseState.STARTED) == 2
    assert slots.end("a") == ("b", "work b")
    assert slots.end("b") == ("c", "work c")
    assert slots.end("c") is None
    assert slots.add("e", 1, "work e") == "work e"


def test_slots_pass_over_a_lease_when_it_ended_before_it_started() -> None:
    slots: SlotTable[str] = SlotTable()
    for name in "abc":
        slots.add(name, 1, f"work {name}")
    assert slots.state("b") is LeaseState.WAITING
    assert slots.end("b") is None
    assert slots.end("a") == ("c", "work c")
    assert slots.state("b") is LeaseState.UNKNOWN


def test_slots_hold_a_lease_once_when_it_is_added_twice() -> None:
    slots: SlotTable[str] = SlotTable()
    assert slots.add("a", 1, "work") == "work"
    assert slots.add("a", 1, "work") is None
    assert slots.end("a") is None
    assert slots.leases() == []


def test_reports_are_kept_in_order_until_they_are_acknowledged() -> None:
    reports: ReportQueue[str] = ReportQueue()
    assert [reports.add("lease", text) for text in "abcd"] == [1, 2, 3, 4]
    assert reports.acknowledge(2) == ["a", "b"]
    assert reports.unacknowledged() == ["c", "d"]
    assert reports.acknowledge(1) == [], "an old acknowledgement changes nothing"
    assert reports.unacknowledged() == ["c", "d"]
    assert reports.acknowledge(9) == ["c", "d"]
    assert reports.unacknowledged() == []
    assert reports.add("lease", "e") == 5


def test_reports_are_overdue_when_they_were_there_two_calls_before() -> None:
    reports: ReportQueue[str] = ReportQueue()
    reports.add("lease", "a")
    assert reports.overdue() == []
    reports.add("lease", "b")
    assert reports.overdue() == []
    assert reports.overdue() == ["a"]
    reports.acknowledge(1)
    assert reports.overdue() == ["b"]


class Executor:
    """Notes its calls. Leases of `begun` cannot be taken back."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.begun: set[str] = set()

    def start(self, work: str) -> None:
        self.calls.append(("start", work))

    def send_ahead(self, work: str, running: str) -> bool:
        return False

    def has_ahead(self, lease_id: str) -> bool:
        return False

    def take_back(self, lease_id: str) -> bool:
        return lease_id not in self.begun

    def feed(self, lease_id: str, outputs: Any) -> None:
        self.calls.append(("feed", lease_id))

    def stop(self, lease_id: str, kind: str, message: str) -> None:
        self.calls.append(("stop", lease_id))
        self.begun.discard(lease_id)

    def cancelled(self, work: str) -> None:
        self.calls.append(("cancelled", work))


def machine(*leases: str) -> tuple[LeaseMachine[str, str, str], Executor, list[str]]:
    """Return a machine of session `s1` with leases in one slot, its executor, and the reports it makes."""
    executor, said = Executor(), list[str]()
    made: LeaseMachine[str, str, str] = LeaseMachine(
        executor, lambda _, report: said.append(report), lambda lease_id: f"{lease_id} returned"
    )
    made.welcome("s1", False, ())
    for number, lease_id in enumerate(leases, 1):
        made.assign(lease_id, 1, "", number, lease_id)
    return made, executor, said


def test_a_lease_is_held_until_all_its_reports_are_acknowledged() -> None:
    leases, _, _ = machine("a", "b")
    for text in ("started", "succeeded"):
        leases.report("a", text)
    leases.ended("a", "outputs")
    assert leases.held() == ["b", "a"], "the server would assign `a` again if it were not told"
    assert not leases.holds("a")
    leases.reports.acknowledge(1)
    assert leases.held() == ["b", "a"]
    leases.reports.acknowledge(2)
    assert leases.held() == ["b"]


def test_a_new_session_holds_nothing_and_numbers_reports_from_one() -> None:
    leases, executor, _ = machine("a", "b")
    leases.report("a", "report")
    assert leases.welcome("s2", False, ()) == []
    assert (leases.session_id, leases.received, leases.held()) == ("s2", 0, [])
    assert executor.calls == [("start", "a"), ("stop", "a")]
    assert leases.reports.add("a", "first") == 1


def test_a_new_session_repeats_unacknowledged_reports_of_adopted_leases() -> None:
    leases, executor, _ = machine("a", "b")
    for lease_id, text in (("a", "a started"), ("a", "a succeeded")):
        leases.report(lease_id, text)
    leases.ended("a", "outputs")
    leases.report("b", "b started")
    leases.reports.acknowledge(1)
    assert leases.welcome("s2", False, (), {"a"}) == ["a succeeded"]
    assert leases.held() == ["a"]
    assert executor.calls[-1] == ("stop", "b")
    leases.reports.acknowledge(1)
    assert leases.held() == []


def test_commands_change_a_lease_by_its_state() -> None:
    leases, executor, said = machine("started", "revoked", "stopped", "left")
    executor.calls.clear()
    for lease_id in ("started", "revoked", "unknown"):
        leases.revoke(lease_id)
    assert said == ["revoked returned"]
    for lease_id in ("started", "stopped", "unknown"):
        leases.stop(lease_id)
    assert executor.calls == [("stop", "started"), ("cancelled", "stopped")]
    leases.ended("stopped", None)
    leases.ended("started", None)
    leases.ended("started", None)
    assert executor.calls[2:] == [("start", "left")]


def test_a_waiting_lease_is_stopped_when_its_runner_has_begun_it() -> None:
    leases, executor, said = machine("a", "b", "c")
    executor.begun = {"b", "c"}
    leases.revoke("b")
    assert said == []
    leases.stop("b")
    leases.welcome("s1", True, ["c"])
    assert executor.calls == [("start", "a"), ("stop", "b"), ("stop", "c")]
    assert leases.held() == ["a", "b"]


def test_a_successor_gets_outputs_or_is_returned() -> None:
    leases, executor, said = machine("a", "b")
    leases.assign("after-a", 1, "a", 3, "after-a")
    leases.assign("after-b", 1, "b", 4, "after-b")
    leases.assign("after-nothing", 1, "gone", 5, "after-nothing")
    assert said == ["after-nothing returned"]
    leases.ended("a", "outputs")
    assert ("feed", "after-a") in executor.calls
    leases.ended("b", None)
    assert said[1:] == ["after-b returned"]
    assert leases.held() == ["after-a", "after-nothing", "after-b"]


class Histories(RuleBasedStateMachine):
    """Random histories beside a model: for each slot, its leases in order, the first of them started."""

    def __init__(self) -> None:
        super().__init__()
        self.table: SlotTable[str] = SlotTable()
        self.reports: ReportQueue[str] = ReportQueue()
        self.slots: dict[int, list[str]] = {}
        self.started: list[str] = []
        self.sent: list[tuple[int, str]] = []
        self.sequence = 0
        self.number = 0

    def assigned(self) -> list[str]:
        return [lease for leases in self.slots.values() for lease in leases]

    @rule(slot=st.integers(1, 3), many=st.integers(1, 4))
    def add(self, slot: int, many: int) -> None:
        for _ in range(many):
            self.number += 1
            name = f"l{self.number}"
            is_first = not self.slots.get(slot)
            self.slots.setdefault(slot, []).append(name)
            assert self.table.add(name, slot, name) == (name if is_first else None)
            self.started += [name] * is_first

    @precondition(lambda self: self.assigned())
    @rule(data=st.data(), slot=st.integers(1, 3))
    def add_again(self, data: st.DataObject, slot: int) -> None:
        assert self.table.add(data.draw(st.sampled_from(self.assigned())), slot, "again") is None

    @precondition(lambda self: self.assigned())
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """End any lease: one that started, or one that was revoked before."""
        lease = data.draw(st.sampled_from(self.assigned()))
        leases = next(leases for leases in self.slots.values() if lease in leases)
        had_started = leases[0] == lease
        leases.remove(lease)
        following = leases[0] if had_started and leases else None
        assert self.table.end(lease) == (following and (following, following))
        self.started += [following] if following else []

    @rule(many=st.integers(1, 3))
    def report(self, many: int) -> None:
        for _ in range(many):
            self.sequence += 1
            self.sent.append((self.sequence, f"r{self.sequence}"))
            assert self.reports.add("lease", f"r{self.sequence}") == self.sequence

    @rule(back=st.integers(-2, 5))
    def acknowledge(self, back: int) -> None:
        sequence = self.sequence - back
        self.reports.acknowledge(sequence)
        self.sent = [entry for entry in self.sent if entry[0] > sequence]

    @invariant()
    def agrees(self) -> None:
        self.table.check()
        assert sorted(self.table.leases()) == sorted(self.assigned())
        assert self.reports.unacknowledged() == [text for _, text in self.sent]
        for leases in self.slots.values():
            states = [self.table.state(lease) for lease in leases]
            assert states == [LeaseState.STARTED, *[LeaseState.WAITING] * (len(leases) - 1)][: len(leases)]
        assert len(self.started) == len(set(self.started)), "a lease was started twice"


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=share(1000), stateful_step_count=40, deadline=None)
