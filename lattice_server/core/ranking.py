"""Owns the order among the tasks of one caller that wait with the same priority. Rule: lower goes first.

`benchmarks/simulate.py` compares these on generated agent workloads; `docs/decisions/` says which won and why.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lattice_server.core.run import Run

Ranking = Callable[["Run", str], float]


def first_come(run: "Run", task_id: str) -> float:
    """Return the same for all: tasks leave in the order in which they became ready."""
    return 0.0


def critical_path(run: "Run", task_id: str) -> float:
    """Return what puts the task with the longest path below it first."""
    return -float(run.dag.height(task_id))


def least_left(run: "Run", task_id: str) -> float:
    """Return what puts the run with the fewest tasks left first, so that runs end instead of sharing what there is."""
    return float(run.open_tasks)
