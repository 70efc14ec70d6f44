"""Keeps books of which tasks are charged for a lost worker, and of which attempt numbers are used up."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lattice_server.core.messages import Assign, LeaseReturned, SchedulerEffect
from lattice_server.core.scheduling.lease_table import Lease
from lattice_server.core.scheduling.scheduler import Scheduler
from lattice_server.core.states import NodeState


class Charges:
    """Compares what workers hold before and after each event that a machine takes."""

    def __init__(self) -> None:
        self._returned: set[str] = set()
        self._used: dict[tuple[str, str, int], str] = {}

    @contextmanager
    def watching(self, machine: Scheduler, event: Any) -> Iterator[None]:
        """Assert that an event charges only members of a lease that was alone on its node, and that the members of
        leases that are lost with a node run alone from then on."""
        held = _by_session(machine)
        draining = {node.session_id for node in machine.nodes.values() if node.state is NodeState.DRAINING}
        known = [
            (task, task.losses, len(leases) == 1, session)
            for session, leases in held.items()
            for lease in leases
            for task in lease.members()
        ]
        if isinstance(event, LeaseReturned):
            for lease in held.get(event.session_id, ()):
                if lease.lease_id == event.lease_id and lease.started_at is None:
                    self._returned.add(event.lease_id)
        yield
        sessions = {node.session_id for node in machine.nodes.values()}
        for task, losses, was_alone, session in known:
            assert task.losses == losses or (was_alone and task.losses == losses + 1), "an innocent is charged"
            is_lost = session not in sessions | draining
            assert not is_lost or task.is_over or task.shape.is_exclusive, "a task that lost its worker meets others"

    def note(self, effects: Iterable[SchedulerEffect]) -> None:
        """Assert that no attempt number is assigned again unless a worker returned it before it began."""
        for effect in effects:
            for attempt in effect.attempts if isinstance(effect, Assign) else ():
                number = (attempt.run_id, attempt.task_id, attempt.attempt)
                before = self._used.setdefault(number, effect.lease_id)
                if before != effect.lease_id:
                    assert before in self._returned, f"attempt {number} may run twice"
                    self._used[number] = effect.lease_id


def _by_session(machine: Scheduler) -> dict[str, list[Lease]]:
    held: dict[str, list[Lease]] = {}
    for lease in machine.leases.values():
        held.setdefault(machine.nodes[lease.slot.node_id].session_id, []).append(lease)
    return held
