"""Random histories of the machines, alone and together, with every invariant checked after each step."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import share
from tests.server.core.crowds import Crowd
from tests.server.core.histories import SchedulerHistories
from tests.server.core.run_histories import RunHistories
from tests.server.core.worlds import World

TestSchedulerHistories = SchedulerHistories.TestCase
TestSchedulerHistories.settings = settings(max_examples=share(1000), stateful_step_count=40, deadline=None)

TestRunHistories = RunHistories.TestCase
TestRunHistories.settings = settings(max_examples=share(1000), stateful_step_count=40, deadline=None)


@settings(max_examples=share(2000), deadline=None)
@given(seed=st.integers(0, 1 << 32), latency_s=st.sampled_from([0.0, 0.0005, 0.02]))
def test_whatever_befalls_a_cluster_everything_ends_and_every_result_is_right(seed: int, latency_s: float) -> None:
    World(seed, latency_s).play()


@settings(max_examples=share(400), deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_whatever_waits_it_is_placed_as_if_all_of_it_were_tried_at_every_step(seed: int) -> None:
    Crowd(seed).play()
