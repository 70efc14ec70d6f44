"""Owns the records of a service's instances. Rule: a state changes only by `Instance.move`, which checks the table."""

from collections.abc import Iterable, Set
from dataclasses import dataclass, field

from lattice_server.core.services.model import (
    INSTANCE_TRANSITIONS,
    WANTED_STATES,
    InstanceState,
    ServiceFailure,
    ServiceSpec,
)
from lattice_server.core.states import transition

# Instances without processes, or without requests, end without being drained.
UNUSED = frozenset({InstanceState.QUEUED, InstanceState.STARTING})
# Instances of an older definition serve until the new ones are ready, unless these wait for resources for so long.
REPLACE_WAIT_S = 5.0
# The order in which instances are stopped: first the instances that serve no requests.
_GIVEN_UP_FIRST = {
    InstanceState.QUEUED: 0,
    InstanceState.UNHEALTHY: 1,
    InstanceState.STARTING: 2,
    InstanceState.READY: 3,
}


@dataclass(slots=True, eq=False)
class Instance:
    """One instance. Times are monotonic seconds.

    `since` is when it entered its state, `queued_at` when it was needed, `started_at` when its program started,
    `ready_at` when it was ready for the first time.
    """

    instance_id: str
    number: int
    revision: int
    spec: ServiceSpec
    since: float
    state: InstanceState = InstanceState.QUEUED
    node_id: str = ""
    node_ip: str = ""
    endpoint: str = ""
    in_flight: int = 0
    detail: str = ""
    started_at: float | None = None
    ready_at: float | None = None
    failure: ServiceFailure | None = None
    queued_at: float = field(init=False)

    def __post_init__(self) -> None:
        """Begin in the queue."""
        self.queued_at = self.since

    def move(self, state: InstanceState, now: float) -> None:
        """Enter a state. Raises InvalidTransition."""
        self.state = transition("instance", self.instance_id, self.state, state, INSTANCE_TRANSITIONS)
        self.since = now

    def become_ready(self, endpoint: str, now: float) -> None:
        """Take requests at an endpoint. Raises InvalidTransition."""
        self.move(InstanceState.READY, now)
        self.endpoint, self.detail = endpoint, ""
        self.ready_at = now if self.ready_at is None else self.ready_at

    @property
    def is_wanted(self) -> bool:
        """Whether it counts among the instances that shall be there."""
        return self.state in WANTED_STATES

    def deadline(self) -> float | None:
        """Return when its state has lasted too long, if ever."""
        if self.state is InstanceState.STARTING:
            return self.since + self.spec.start_timeout_s
        if self.state is InstanceState.DRAINING:
            return self.since + self.spec.drain_timeout_s
        return None


def victims(instances: list[Instance], count: int) -> list[Instance]:
    """Return the `count` instances to give up: those without use first, then those with few requests, the youngest."""

    def order(instance: Instance) -> tuple[int, int, int]:
        return _GIVEN_UP_FIRST[instance.state], instance.in_flight, -instance.number

    return sorted(instances, key=order)[:count]


def elsewhere(instances: Iterable[Instance], node_ids: Set[str]) -> list[Instance]:
    """Return the instances that are on other nodes than these."""
    return [found for found in instances if found.is_wanted and found.node_id and found.node_id not in node_ids]


def replacement_at(instances: Iterable[Instance], revision: int) -> float | None:
    """Return when older instances have to make room for one of a revision that waits for resources."""
    present = [found for found in instances if found.is_wanted]
    if all(found.revision == revision for found in present):
        return None
    queued = (found for found in present if found.state is InstanceState.QUEUED and found.revision == revision)
    return min((found.since + REPLACE_WAIT_S for found in queued), default=None)
