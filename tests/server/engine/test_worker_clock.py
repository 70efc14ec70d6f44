"""Times on a worker's clock, as this server's clock would have told them."""

import random

import pytest

from lattice_server.engine.workers.clock_offset import WINDOW, WorkerClock

SKEW_S = 3600.0


@pytest.mark.parametrize("skew_s", [-SKEW_S, 0.0, SKEW_S])
def test_a_time_is_as_exact_as_the_least_delay(skew_s: float) -> None:
    clock, rng = WorkerClock(), random.Random(1)
    for number in range(WINDOW):
        sent_at = 100.0 + number
        clock.note(sent_at + skew_s, sent_at + 0.001 + rng.expovariate(10))
    clock.note(150.0 + skew_s, 150.001)
    assert clock.at(140.0 + skew_s) == pytest.approx(140.0, abs=0.0011)


def test_a_time_is_never_after_the_receipt_of_its_message() -> None:
    clock = WorkerClock()
    clock.note(10.0, 5.0)
    clock.note(30.0, 20.0)
    assert clock.at(30.0) == 20.0


@pytest.mark.parametrize("step_s", [-SKEW_S, SKEW_S])
def test_a_clock_that_is_set_is_followed(step_s: float) -> None:
    clock = WorkerClock()
    for number in range(2 * WINDOW):
        clock.note(float(number), number + 0.001)
    for number in range(2 * WINDOW, 5 * WINDOW):
        clock.note(number + step_s, number + 0.001)
    assert clock.at(200.0 + step_s) == pytest.approx(200.001)
