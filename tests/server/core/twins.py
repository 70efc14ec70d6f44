"""A machine that is compared, at every step, with one that tries everything that waits at every step."""

from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

from lattice_server.core import launching
from lattice_server.core.batching import OPEN, BatchCollector, Lane
from lattice_server.core.dispatch import Dispatch
from lattice_server.core.launching import Launcher
from lattice_server.core.messages import NodesChanged, SchedulerEffect, SchedulerEvent
from lattice_server.core.turns import Round
from tests.server.core.charges import Charges


class ThoroughRound(Round):
    """A round that passes over nothing unseen."""

    def is_over(self, lane: Lane) -> bool:
        """Have everything tried."""
        return False


class ThoroughLauncher(Launcher):
    """A launcher that tries everything, always."""

    def _may_place(self, now: float) -> bool:
        return True

    def _lane_of(self, collector: BatchCollector, now: float) -> Lane:
        return OPEN


class Twins(Dispatch):
    """A machine, and a thorough one that is told the same and must decide the same."""

    def __init__(self, epoch: str, session_ttl_s: float = 30.0, limits: Mapping[str, int] | None = None) -> None:
        super().__init__(epoch, session_ttl_s, limits)
        with mock.patch("lattice_server.core.dispatch.Launcher", ThoroughLauncher):
            self._thorough = Dispatch(epoch, session_ttl_s, limits)
        self._charges = Charges()

    def handle_all(self, events: Sequence[SchedulerEvent], now: float) -> list[SchedulerEffect]:
        """Tell both."""
        effects = super().handle_all(events, now)
        with mock.patch.object(launching, "Round", ThoroughRound):
            others = self._thorough.handle_all(events, now)
        assert list(map(_comparable, effects)) == list(map(_comparable, others))
        assert self.next_deadline() == self._thorough.next_deadline()
        assert _state(self) == _state(self._thorough)
        return effects

    def take(self, event: SchedulerEvent, now: float) -> None:
        """Take an event, and look at whom it charges."""
        with self._charges.watching(self, event):
            super().take(event, now)

    def tick(self, now: float) -> list[SchedulerEffect]:
        """Tick, and read every clock, as the other does: sums that are rounded elsewhere are not quite the same."""
        with self._charges.watching(self, None):
            effects = super().tick(now)
        self._charges.note(effects)
        queue = self._launcher.queue
        for name in queue.tenants:
            queue.clocks.turn(name, now)
        return effects


def _comparable(effect: SchedulerEffect) -> Any:
    return len(effect.nodes) if isinstance(effect, NodesChanged) else effect


def _state(machine: Dispatch) -> dict[tuple[str, str], tuple[float | None, bool, str | None]]:
    """What is to decide later: since when what waits is blocked, whether it was passed, which node is kept for it."""
    keeping, found = machine._launcher.keeping, {}
    for name, task in machine.tasks.items():
        line = task.collector
        if line is not None:
            found[name] = (line.blocked_since, line.was_passed, keeping.node_of(line))
    return found
