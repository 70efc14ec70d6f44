"""The measurements on small sizes: they end, and their counts are right. No test asserts a duration."""

import pytest

from benchmarks import idle, langgraph_nodes, readers
from benchmarks.readers import Readings, Seen

pytestmark = pytest.mark.slow


def test_each_reader_of_a_run_gets_each_event_once() -> None:
    found = readers.measure_alone(cpus=4, rounds=1, readers=40)
    (seen,) = found.seen
    assert seen.is_whole
    # Each task starts and succeeds; besides, the run starts and ends, and one task waits for a signal and gets it.
    assert seen.events == 2 * found.samples()["tasks"][0] + 5
    assert 40 < seen.messages <= 40 * seen.events
    assert min(seen.opened_s, seen.told_s, *found.with_s, *found.without_s) > 0


def test_readings_are_refused_when_a_reader_missed_an_event() -> None:
    lossy = Seen(0.1, 0.1, 5, 5, is_whole=False)
    with pytest.raises(RuntimeError, match="each event once"):
        Readings(1, [lossy], [1.0], [1.0]).samples()


def test_idle_processes_are_measured() -> None:
    found = idle.measure(["local"], seconds=0.5, settle_s=0)
    assert found.keys() == {"server, local", "agent, local"}
    assert all(0 < share < 2 for share in found.values())


def test_nodes_of_langgraph_are_measured_on_both_sides() -> None:
    found = langgraph_nodes.measure(invocations=2, rounds=1000)
    assert {side: len(samples) for side, samples in found.items()} == {"plain": 2, "lattice": 2}
