"""Owns how many instances the use of a service asks for. Rule: a service that is used is never asleep."""

import math
from collections.abc import Collection

from lattice_server.core.services.instances import UNUSED, Instance
from lattice_server.core.services.model import InstanceState, ServiceSpec

SHRINK_DELAY_S = 60.0


class Demand:
    """The use of one service: the numbers of waiters, of attempts that have its address, and of requests in flight.

    Fewer instances are wanted only once that has been so for `shrink_delay_s`.
    """

    def __init__(self, *, is_asleep: bool, shrink_delay_s: float = SHRINK_DELAY_S) -> None:
        self._shrink_delay_s = shrink_delay_s
        self.waiting = self.users = self.in_flight = 0
        self.is_asleep = is_asleep
        self._idle_since: float | None = None
        self._load_floor = 0  # How many instances the load of the last time needs.
        self._shrink_at: float | None = None

    @property
    def is_used(self) -> bool:
        """Whether there are requests, attempts that may make some, or waiters."""
        return bool(self.waiting or self.users or self.in_flight)

    def wanted(self, spec: ServiceSpec) -> int:
        """Return how many instances there shall be."""
        if self.is_asleep and not self.is_used:
            return 0
        return min(spec.max_replicas, max(1, spec.replicas, self._load_floor))

    def note(self, spec: ServiceSpec, instances: Collection[Instance], now: float) -> None:
        """Take the requests of the instances, and decide what follows from them and from the time."""
        self.in_flight = sum(found.in_flight for found in instances if found.is_wanted)
        # One that starts is never stopped for being idle.
        is_settled = bool(instances) and not any(found.state in UNUSED for found in instances)
        if self.is_used:
            self.is_asleep, self._idle_since = False, None
        elif not is_settled:
            self._idle_since = None
        elif self._idle_since is None and not self.is_asleep:
            self._idle_since = now
        if (deadline := self._idle_deadline(spec)) is not None and now >= deadline:
            self.is_asleep, self._idle_since, self._load_floor = True, None, 0
        if spec.concurrency is not None:
            ready = sum(found.state is InstanceState.READY for found in instances)
            self._note_load(math.ceil((self.in_flight + self.waiting) / spec.concurrency), spec, ready, now)

    def _note_load(self, needed: int, spec: ServiceSpec, ready: int, now: float) -> None:
        needed = min(needed, spec.max_replicas)
        if needed > self._load_floor:
            # At most double, so that one burst does not start all.
            self._load_floor = max(self._load_floor, min(needed, max(1, 2 * ready)))
            self._shrink_at = None
        elif needed == self._load_floor:
            self._shrink_at = None
        elif self._shrink_at is None:
            self._shrink_at = now + self._shrink_delay_s
        elif now >= self._shrink_at:
            self._load_floor, self._shrink_at = needed, None

    def limit(self, replicas: int, max_replicas: int) -> None:
        """Note that a caller changed how many instances there are."""
        self.is_asleep = replicas == 0
        self._load_floor = min(self._load_floor, max_replicas)

    def deadlines(self, spec: ServiceSpec) -> list[float | None]:
        """Return when `note` decides by time."""
        return [self._idle_deadline(spec), self._shrink_at]

    def _idle_deadline(self, spec: ServiceSpec) -> float | None:
        limit_s = spec.idle_timeout_s
        return None if self._idle_since is None or limit_s is None else self._idle_since + limit_s
