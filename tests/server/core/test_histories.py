"""Random histories of the machines, alone and together, with every invariant checked after each step."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import share
from tests.server.core.crowds import Crowd
from tests.server.core.histories import SchedulerHistories
from tests.server.core.restart_histories import RestartHistories
from tests.server.core.run_histories import RunHistories
from tests.server.core.worlds import World

TestSchedulerHistories = SchedulerHistories.TestCase
TestSchedulerHistories.settings = settings(max_examples=share(1000), stateful_step_count=40, deadline=None)

TestRunHistories = RunHistories.TestCase
TestRunHistories.settings = settings(max_examples=share(1000), stateful_step_count=40, deadline=None)

TestRestartHistories = RestartHistories.TestCase
TestRestartHistories.settings = settings(max_examples=share(1000), stateful_step_count=40, deadline=None)


@settings(max_examples=share(2000), deadline=None)
@given(seed=st.integers(0, 1 << 32), latency_s=st.sampled_from([0.0, 0.0005, 0.02]))
def test_all_runs_end_with_right_results_under_random_faults(seed: int, latency_s: float) -> None:
    World(seed, latency_s).play()


@settings(max_examples=share(400), deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_placement_equals_that_of_trying_every_task_at_every_step(seed: int) -> None:
    Crowd(seed).play()
