"""Random histories of the machines, with every invariant checked after each step."""

from hypothesis import settings

from tests.server.core.histories import DispatchHistories

TestDispatchHistories = DispatchHistories.TestCase
TestDispatchHistories.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
