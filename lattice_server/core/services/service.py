"""Owns the decisions about one service: how many instances there are, and what becomes of each.

Rule: it decides here and nowhere else; the engine reports facts and carries out effects.
"""

from dataclasses import replace
from typing import assert_never

from lattice_server.core.services.demand import SHRINK_DELAY_S, Demand
from lattice_server.core.services.instances import UNUSED, Instance, elsewhere, replacement_at, victims
from lattice_server.core.services.messages import (
    CancelInstance,
    Defined,
    Effect,
    Event,
    InstanceEnded,
    InstanceReady,
    InstanceStarted,
    InstanceUnhealthy,
    InstanceWaits,
    LoadReported,
    NodesChanged,
    RoutesChanged,
    Scaled,
    ServiceGone,
    StartInstance,
    StopInstance,
    Stopped,
    UseChanged,
)
from lattice_server.core.services.model import (
    FailureKind,
    InstanceState,
    ServiceFailure,
    ServiceSpec,
    ServiceState,
)
from lattice_server.core.services.restarts import Restarts


class Service:
    """The machine of one service. Times are monotonic seconds."""

    def __init__(self, spec: ServiceSpec, shrink_delay_s: float = SHRINK_DELAY_S) -> None:
        self.spec = spec
        self.revision = 1
        self.instances: dict[str, Instance] = {}
        self.last_ended: Instance | None = None
        self.restarts = 0
        self.is_stopping = self.is_gone = False
        self.starts = Restarts()
        self._numbers = 0
        self.demand = Demand(is_asleep=spec.replicas == 0, shrink_delay_s=shrink_delay_s)

    # What callers see.

    @property
    def ready(self) -> list[Instance]:
        """The instances that take requests."""
        return [found for found in self.instances.values() if found.state is InstanceState.READY]

    @property
    def takes_requests(self) -> bool:
        """Whether a request would be answered now."""
        return bool(self.ready or self.spec.base_url) and not self.is_stopping

    @property
    def wanted(self) -> int:
        """How many instances there shall be now."""
        if self.is_stopping or self.starts.given_up is not None or self.spec.base_url:
            return 0
        return self.demand.wanted(self.spec)

    @property
    def state(self) -> ServiceState:
        """The state of the service."""
        ready = len(self.ready)
        if self.is_stopping:
            return ServiceState.STOPPING
        if self.starts.given_up is not None:
            return ServiceState.FAILED
        if self.spec.base_url:
            return ServiceState.READY
        if ready >= self.wanted:
            return ServiceState.READY if ready else ServiceState.IDLE
        return ServiceState.DEGRADED if ready else ServiceState.STARTING

    # Decisions.

    def start(self, now: float) -> list[Effect]:
        """Begin."""
        routes: list[Effect] = [RoutesChanged()] if self.spec.base_url else []
        return routes + self._converge(now)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take a fact. A fact about an instance that has ended changes nothing."""
        effects: list[Effect] = []
        match event:
            case Defined():
                self._define(event.spec)
                effects.append(RoutesChanged())
            case Scaled():
                self._scale(event)
            case Stopped():
                self.is_stopping = True
            case UseChanged():
                self.demand.waiting, self.demand.users = event.waiting, event.users
            case NodesChanged():
                for displaced in elsewhere(self.instances.values(), event.node_ids):
                    effects += self._give_up(displaced, now)
            case _:
                instance = self.instances.get(event.instance_id)
                if instance is None:
                    return []
                effects += self._handle_instance(instance, event, now)
        return effects + self._converge(now)

    def tick(self, now: float) -> list[Effect]:
        """Decide what is due."""
        effects: list[Effect] = []
        for instance in list(self.instances.values()):
            if (deadline := instance.deadline()) is not None and now >= deadline:
                if instance.state is InstanceState.STARTING:
                    limit_s = instance.spec.start_timeout_s
                    why = instance.detail and f": {instance.detail}"
                    text = f"it was not ready within {limit_s:g} s{why}"
                    instance.failure = ServiceFailure(FailureKind.START_TIMEOUT, text)
                effects += self._end(instance, now)
        return effects + self._converge(now)

    def next_deadline(self) -> float | None:
        """Return when `tick` is due next, or None."""
        found = [instance.deadline() for instance in self.instances.values()]
        found += [*self.demand.deadlines(self.spec), replacement_at(self.instances.values(), self.revision)]
        if self._missing() > 0:
            found.append(self.starts.not_before)
        return min((at for at in found if at is not None), default=None)

    def _define(self, spec: ServiceSpec) -> None:
        # Another budget changes nothing of the instances.
        if replace(spec, budget=self.spec.budget) != self.spec or self.starts.given_up is not None or self.is_stopping:
            self.revision += 1
            self.starts = Restarts()
            self.demand.is_asleep = spec.replicas == 0
        self.spec = spec
        self.is_stopping = False

    def _scale(self, event: Scaled) -> None:
        self.spec = replace(self.spec, replicas=event.replicas, max_replicas=event.max_replicas)
        self.demand.limit(event.replicas, event.max_replicas)

    def _handle_instance(
        self,
        instance: Instance,
        event: InstanceStarted | InstanceWaits | InstanceReady | InstanceUnhealthy | LoadReported | InstanceEnded,
        now: float,
    ) -> list[Effect]:
        match event:
            case InstanceStarted():
                instance.node_id, instance.node_ip = event.node_id, event.node_ip
                if instance.state is InstanceState.QUEUED:
                    instance.move(InstanceState.STARTING, now)
                    instance.started_at = now
            case InstanceWaits():
                if instance.state is InstanceState.STARTING:
                    instance.detail = event.detail
            case InstanceReady():
                return self._become_ready(instance, event, now)
            case InstanceUnhealthy():
                return self._become_unhealthy(instance, event, now)
            case LoadReported():
                instance.in_flight = event.in_flight
                if instance.state is InstanceState.DRAINING and not event.in_flight:
                    return self._end(instance, now)
            case InstanceEnded():
                return self._note_end(instance, event.failure, now)
            case _:
                assert_never(event)
        return []

    def _become_ready(self, instance: Instance, event: InstanceReady, now: float) -> list[Effect]:
        if instance.state not in {InstanceState.STARTING, InstanceState.UNHEALTHY}:
            return []
        instance.become_ready(event.endpoint, now)
        self.starts.ready()
        return [RoutesChanged()]

    def _become_unhealthy(self, instance: Instance, event: InstanceUnhealthy, now: float) -> list[Effect]:
        limit = instance.spec.health.failures
        instance.detail = event.detail
        if instance.state is InstanceState.UNHEALTHY and event.failures >= 2 * limit:
            text = f"{event.failures} health checks in a row failed, the last one: {event.detail}"
            instance.failure = ServiceFailure(FailureKind.UNHEALTHY, text)
            return self._end(instance, now)
        if instance.state is InstanceState.READY and event.failures >= limit:
            instance.move(InstanceState.UNHEALTHY, now)
            return [RoutesChanged()]
        return []

    def _note_end(self, instance: Instance, failure: ServiceFailure | None, now: float) -> list[Effect]:
        was_routed = instance.state is InstanceState.READY
        was_wanted = instance.is_wanted
        # A failure that the machine found, such as a timeout, is the cause of the end that is reported.
        own = instance.failure
        ready_s = now - instance.since if was_routed else 0.0
        if failure is None and was_wanted:
            failure = ServiceFailure(FailureKind.EXITED, "its program ended", exit_status=0)
        cause = own or (failure if was_wanted else None)
        if own is not None and failure is not None:
            cause = ServiceFailure(own.kind, own.message, failure.exit_status, failure.signal, failure.last_lines)
        instance.failure, instance.in_flight = cause, 0
        instance.move(InstanceState.ENDED, now)
        del self.instances[instance.instance_id]
        self.last_ended = instance
        if cause is not None:
            self.restarts += 1
            if instance.revision == self.revision:
                self.starts.failed(cause, instance.number, ready_s, now)
        return [RoutesChanged()]

    def _end(self, instance: Instance, now: float) -> list[Effect]:
        """End an instance, without draining it."""
        routes: list[Effect] = [RoutesChanged()] if instance.state is InstanceState.READY else []
        is_queued = instance.state is InstanceState.QUEUED
        instance.move(InstanceState.STOPPING, now)
        if is_queued:
            return [*routes, CancelInstance(instance.instance_id)]
        return [*routes, StopInstance(instance.instance_id, instance.spec.stop_grace_s)]

    def _give_up(self, instance: Instance, now: float) -> list[Effect]:
        """Drain an instance if it has requests, or end it."""
        if instance.state in UNUSED or not instance.in_flight:
            return self._end(instance, now)
        routes: list[Effect] = [RoutesChanged()] if instance.state is InstanceState.READY else []
        instance.move(InstanceState.DRAINING, now)
        return routes

    def _missing(self) -> int:
        """Return how many instances are to be started. One that failed is replaced when its processes are gone."""
        current = [found for found in self.instances.values() if found.revision == self.revision]
        return self.wanted - sum(found.is_wanted or found.failure is not None for found in current)

    def _converge(self, now: float) -> list[Effect]:
        """Start and give up instances until there are as many as wanted."""
        if self.is_gone:
            return []
        self.demand.note(self.spec, self.instances.values(), now)
        effects: list[Effect] = []
        if (missing := self._missing()) > 0 and self.starts.may_start(now):
            self.starts.started()
            effects += [self._start_one(now) for _ in range(missing)]
        for instance in self._surplus(now):
            effects += self._give_up(instance, now)
        if self.is_stopping and not self.instances:
            self.is_gone = True
            effects.append(ServiceGone())
        return effects

    def _surplus(self, now: float) -> list[Instance]:
        """Return the instances to give up: those of older revisions leave when the new ones are ready."""
        present = [found for found in self.instances.values() if found.is_wanted]
        current = [found for found in present if found.revision == self.revision]
        older = [found for found in present if found.revision != self.revision]
        are_ready = sum(found.state is InstanceState.READY for found in current) >= self.wanted
        if not are_ready and ((at := replacement_at(self.instances.values(), self.revision)) is None or now < at):
            # Older ones that are not ready would only take resources from the new ones.
            older = [found for found in older if found.state is not InstanceState.READY]
        return older + victims(current, max(0, len(current) - self.wanted))

    def _start_one(self, now: float) -> StartInstance:
        self._numbers += 1
        instance_id = f"{self.spec.name}-{self._numbers}"
        self.instances[instance_id] = Instance(instance_id, self._numbers, self.revision, self.spec, now)
        return StartInstance(instance_id)

    def check(self) -> None:
        """Assert every invariant; tests call it after each step."""
        present = [found for found in self.instances.values() if found.is_wanted and found.revision == self.revision]
        assert len(present) <= max(self.wanted, 0), "more instances than wanted"
        assert 0 <= self.wanted <= self.spec.max_replicas
        assert not (self.is_stopping and any(found.is_wanted for found in self.instances.values()))
        assert not (self.is_gone and self.instances), "instances outlived their service"
        for name, instance in self.instances.items():
            assert name == instance.instance_id
            assert instance.state is not InstanceState.ENDED, "an instance that ended is still known"
            assert instance.state in UNUSED or instance.state is InstanceState.STOPPING or instance.node_id
        missing = self._missing()
        assert missing <= 0 or self.starts.not_before is not None, "instances are missing and none will be started"
