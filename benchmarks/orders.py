"""Owns orders among the waiting tasks of one tenant that are compared with the server's. Rule: lowest rank first.

An order makes the ranking of one run from its graph.
"""

from collections.abc import Callable

from lattice_server.core.run.dag import Dag
from lattice_server.core.run.ordering import Ranking
from lattice_server.core.run.ordering import least_left_aged as ranked_by_server

Order = Callable[[Dag], Ranking]


def first_come(graph: Dag) -> Ranking:
    """Rank all tasks the same: they start in the order in which they became ready."""
    return lambda started_at, open_tasks, task_id: 0.0


def oldest_run(graph: Dag) -> Ranking:
    """Prefer the run that started first."""
    return lambda started_at, open_tasks, task_id: started_at


def critical_path(graph: Dag) -> Ranking:
    """Prefer the task with the longest path of tasks after it."""
    heights: dict[str, int] = {}

    def height(task_id: str) -> int:
        """Return the number of tasks on the longest path that begins with a task."""
        frontier = [task_id]
        while frontier:
            unknown = [s for s in graph.successors[frontier[-1]] if s not in heights]
            if unknown:
                frontier += unknown
                continue
            found = frontier.pop()
            heights[found] = 1 + max((heights[s] for s in graph.successors[found]), default=0)
        return heights[task_id]

    return lambda started_at, open_tasks, task_id: -float(height(task_id))


def least_left(graph: Dag) -> Ranking:
    """Prefer the run with the fewest tasks left."""
    return lambda started_at, open_tasks, task_id: float(open_tasks)


def least_left_aged(graph: Dag) -> Ranking:
    """Prefer runs with few tasks left, and old runs: the order of the server."""
    return ranked_by_server
