"""Owns the order among the waiting tasks of one tenant. Rule: the task with the lowest rank goes first.

`benchmarks/simulate.py` compares other orders with this one; see decision 0002.
"""

from collections.abc import Callable
from math import sqrt

# If it is larger, small runs pass old large ones for longer; if it is much shorter than tasks, only age counts.
AGEING_S = 10.0
MAX_AGE_S = 600.0  # The most that a run counts as older than a task of it that becomes ready; see decision 0021.

# The rank of a task, from when its run started, how many tasks of the run have not ended, and the task's id.
Ranking = Callable[[float, int, str], float]


def least_left_aged(started_at: float, open_tasks: int, task_id: str) -> float:
    """Return a rank that prefers runs with few tasks left, and old runs.

    A run counts as if it had started later than it did, by 10 seconds times the square root of its tasks left. So one
    of five tasks passes one of ten thousand that is up to 16 minutes older, but no older one.
    """
    return started_at + AGEING_S * sqrt(open_tasks)
