"""A machine that is checked at every step: no queued task could be placed, and only tasks at fault are charged."""

from collections.abc import Mapping, Sequence

from lattice_server.core.messages import SchedulerEffect, SchedulerEvent
from lattice_server.core.scheduling.placement import devices_on, suits
from lattice_server.core.scheduling.scheduler import Scheduler
from tests.server.core.charges import Charges


class CheckedScheduler(Scheduler):
    """The scheduler's machine with checks of its placements and charges."""

    def __init__(self, epoch: str, session_ttl_s: float = 30.0, limits: Mapping[str, int] | None = None) -> None:
        super().__init__(epoch, session_ttl_s, limits)
        self._charges = Charges()

    def handle_all(self, events: Sequence[SchedulerEvent], now: float) -> list[SchedulerEffect]:
        """Take events; assert that nothing is left that could be placed."""
        effects = super().handle_all(events, now)
        self._check_placed(now)
        return effects

    def take(self, event: SchedulerEvent, now: float) -> None:
        """Take an event, and check which tasks it charges."""
        with self._charges.watching(self, event):
            super().take(event, now)

    def tick(self, now: float) -> list[SchedulerEffect]:
        """Tick, and check which tasks that charges."""
        with self._charges.watching(self, None):
            effects = super().tick(now)
        self._charges.note(effects)
        return effects

    def _check_placed(self, now: float) -> None:
        """Try every group on every node, which the machine must not need to do."""
        placer = self._placer
        # A call that allows fewer calls than others of its key goes first, when its turn comes first.
        groups = [group for group in placer.queue.groups() if not placer.permits.has_free(group.concurrency)]
        blocked = {group.concurrency.key for group in groups if group.concurrency is not None}
        for group in placer.queue.groups():
            if group.due_at() > now:
                continue
            if not (placer.permits.has_free(group.concurrency) or placer.reservations.has(group)):
                continue
            if group.concurrency is not None and group.concurrency.key in blocked:
                continue
            reserved = placer.reservations.of_others(group)
            for node in self.nodes.values():
                if node.takes_work and suits(group.shape, node.spec):
                    kept = reserved.get(node.node_id)
                    assert devices_on(node, group.shape, kept) is None, f"{group.key} could be placed on {node.node_id}"
