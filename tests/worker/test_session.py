"""What a worker holds: examples, and random histories with what must hold checked after each step."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lattice_worker.session import Session
from tests.examples import share

Worker = Session[str, str]


def session() -> Worker:
    return Session()


def test_leases_of_one_slot_run_in_order_and_slots_side_by_side() -> None:
    worker = session()
    assert worker.assign("a", 1, "work a") == "work a"
    assert worker.assign("b", 1, "work b") is None
    assert worker.assign("c", 1, "work c") is None
    assert worker.assign("d", 2, "work d") == "work d"
    assert worker.held() == ["a", "b", "c", "d"]
    assert worker.running() == ["a", "d"]
    assert worker.end("a") == "work b"
    assert worker.end("b") == "work c"
    assert worker.end("c") is None
    assert worker.assign("e", 1, "work e") == "work e"


def test_a_lease_given_back_before_its_turn_is_passed_over() -> None:
    worker = session()
    for name in "abc":
        worker.assign(name, 1, f"work {name}")
    assert worker.has_started("b") is False
    assert worker.end("b") is None
    assert worker.end("a") == "work c"
    assert worker.has_started("b") is None


def test_a_lease_sent_twice_is_held_once() -> None:
    worker = session()
    assert worker.assign("a", 1, "work") == "work"
    assert worker.assign("a", 1, "work") is None
    assert worker.end("a") is None
    assert worker.held() == []


def test_reports_are_kept_until_acknowledged_and_sent_again_in_order() -> None:
    worker = session()
    assert [worker.add_report("lease", text) for text in "abcd"] == [1, 2, 3, 4]
    worker.acknowledge(2)
    assert worker.unacknowledged() == ["c", "d"]
    worker.acknowledge(1)
    assert worker.unacknowledged() == ["c", "d"], "an old acknowledgement changes nothing"
    worker.acknowledge(9)
    assert worker.unacknowledged() == []
    assert worker.add_report("lease", "e") == 5


def test_a_lease_is_held_until_the_server_has_all_its_reports() -> None:
    worker = session()
    for name in "ab":
        worker.assign(name, 1, f"work {name}")
    for text in ("started", "succeeded"):
        worker.add_report("a", text)
    worker.end("a")
    assert sorted(worker.held()) == ["a", "b"], "the server would send `a` again if it were not told"
    assert worker.running() == ["b"]
    assert worker.has_started("a") is None
    worker.acknowledge(1)
    assert sorted(worker.held()) == ["a", "b"]
    worker.acknowledge(2)
    assert worker.held() == ["b"]


def test_a_new_session_holds_nothing_and_counts_from_one() -> None:
    worker = session()
    worker.assign("a", 1, "work")
    worker.add_report("a", "report")
    worker.reset("s2")
    assert (worker.session_id, worker.held(), worker.running(), worker.unacknowledged()) == ("s2", [], [], [])
    assert worker.add_report("a", "first") == 1
    assert worker.assign("a", 1, "work") == "work"


class Histories(RuleBasedStateMachine):
    """Random histories beside a model: for each slot, its leases in order, the first of them running."""

    def __init__(self) -> None:
        super().__init__()
        self.worker = session()
        self.slots: dict[int, list[str]] = {}
        self.started: list[str] = []
        self.known: list[str] = []
        self.reports: list[tuple[int, str, str]] = []
        self.sequence = 0
        self.number = 0

    def assigned(self) -> list[str]:
        return [lease for leases in self.slots.values() for lease in leases]

    @rule(slot=st.integers(1, 3), many=st.integers(1, 4))
    def assign(self, slot: int, many: int) -> None:
        for _ in range(many):
            self.number += 1
            name = f"l{self.number}"
            self.known.append(name)
            is_first = not self.slots.get(slot)
            self.slots.setdefault(slot, []).append(name)
            assert self.worker.assign(name, slot, name) == (name if is_first else None)
            self.started += [name] * is_first

    @precondition(lambda self: self.assigned())
    @rule(data=st.data(), slot=st.integers(1, 3))
    def assign_again(self, data: st.DataObject, slot: int) -> None:
        assert self.worker.assign(data.draw(st.sampled_from(self.assigned())), slot, "again") is None

    @precondition(lambda self: self.assigned())
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """End any lease: one that ran to its end, or one that was revoked before its turn."""
        lease = data.draw(st.sampled_from(self.assigned()))
        leases = next(leases for leases in self.slots.values() if lease in leases)
        was_running = leases[0] == lease
        leases.remove(lease)
        following = leases[0] if was_running and leases else None
        assert self.worker.end(lease) == following
        self.started += [following] if following else []

    @precondition(lambda self: self.known)
    @rule(data=st.data(), many=st.integers(1, 3))
    def report(self, data: st.DataObject, many: int) -> None:
        """Report on any lease of the session: its last word is said when it has ended."""
        for _ in range(many):
            self.sequence += 1
            lease, text = data.draw(st.sampled_from(self.known)), f"r{self.sequence}"
            self.reports.append((self.sequence, lease, text))
            assert self.worker.add_report(lease, text) == self.sequence

    @rule(back=st.integers(-2, 5))
    def acknowledge(self, back: int) -> None:
        sequence = self.sequence - back
        self.worker.acknowledge(sequence)
        self.reports = [entry for entry in self.reports if entry[0] > sequence]

    @rule()
    def reset(self) -> None:
        self.worker.reset(f"s{self.number}")
        self.slots, self.known, self.reports, self.sequence = {}, [], [], 0

    @invariant()
    def agrees(self) -> None:
        assert sorted(self.worker.held()) == sorted({*self.assigned(), *(lease for _, lease, _ in self.reports)})
        assert sorted(self.worker.running()) == sorted(leases[0] for leases in self.slots.values() if leases)
        assert self.worker.unacknowledged() == [text for _, _, text in self.reports]
        for leases in self.slots.values():
            assert [self.worker.has_started(lease) for lease in leases] == [i == 0 for i in range(len(leases))]
        assert len(self.started) == len(set(self.started)), "a lease was started twice"


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=share(1000), stateful_step_count=40, deadline=None)
