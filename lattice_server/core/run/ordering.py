"""Owns the order among the tasks of one caller that wait with the same priority. Rule: lower goes first.

`benchmarks/simulate.py` compares these on generated agent workloads; `docs/decisions/` says which won and why.
"""

from collections.abc import Callable
from math import sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lattice_server.core.run.run import Run

Ranking = Callable[["Run", str], float]

# Larger, and small runs pass old large ones for longer; much smaller than tasks are long, and age alone decides.
AGEING_S = 10.0


def first_come(run: "Run", task_id: str) -> float:
    """Return the same for all: tasks leave in the order in which they became ready."""
    return 0.0


def oldest_run(run: "Run", task_id: str) -> float:
    """Return what puts the run that started first first."""
    return run.started_at


def critical_path(run: "Run", task_id: str) -> float:
    """Return what puts the task with the longest path below it first."""
    return -float(run.dag.height(task_id))


def least_left(run: "Run", task_id: str) -> float:
    """Return what puts the run with the fewest tasks left first, so that runs end instead of sharing what there is."""
    return float(run.open_tasks)


def least_left_aged(run: "Run", task_id: str) -> float:
    """Return what puts runs with few tasks left first, but none first forever.

    A run counts as if it had started later, in seconds, than it did: by the square root of its tasks left. So one of
    five tasks passes one of ten thousand that is up to 16 minutes older, and none that is older still.
    """
    return run.started_at + AGEING_S * sqrt(run.open_tasks)
