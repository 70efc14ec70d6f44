"""The machine of a service: starts, restarts, health, idleness, load, replacement, and its invariants."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_server.core.services.demand import SHRINK_DELAY_S
from lattice_server.core.services.instances import REPLACE_WAIT_S
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
    INSTANCE_TRANSITIONS,
    FailureKind,
    HealthCheck,
    InstanceState,
    ServiceFailure,
    ServiceSpec,
    ServiceState,
)
from lattice_server.core.services.restarts import MAX_FAILURES, STABLE_S
from lattice_server.core.services.service import Service

SPEC = ServiceSpec("web", command=("serve",))
EXITED = ServiceFailure(FailureKind.EXITED, "it exited", exit_status=1)
NO_COMMAND = ServiceFailure(FailureKind.COMMAND_NOT_FOUND, "no such file")


class Driven:
    """A service whose effects are kept, and whose machine is checked after each step."""

    def __init__(self, spec: ServiceSpec = SPEC, **changes: Any) -> None:
        self.machine = Service(replace(spec, **changes))
        self.now = 0.0
        self.live: set[str] = set()
        self.effects = self._keep(self.machine.start(self.now))

    def _keep(self, effects: Sequence[Effect]) -> list[Effect]:
        for effect in effects:
            if isinstance(effect, StartInstance):
                assert effect.instance_id not in self.live
                self.live.add(effect.instance_id)
            elif isinstance(effect, StopInstance | CancelInstance):
                assert effect.instance_id in self.live, "an instance that has ended gets a command"
        self.machine.check()
        self.effects = [effect for effect in effects if not isinstance(effect, RoutesChanged)]
        return self.effects

    def tell(self, event: Event) -> list[Effect]:
        if isinstance(event, InstanceEnded):
            self.live.discard(event.instance_id)
        return self._keep(self.machine.handle(event, self.now))

    def advance(self, seconds: float) -> list[Effect]:
        self.now += seconds
        return self._keep(self.machine.tick(self.now))

    def ready(self, instance_id: str) -> list[Effect]:
        self.tell(InstanceStarted(instance_id, "n", "10.0.0.1"))
        return self.tell(InstanceReady(instance_id, "127.0.0.1:1"))

    def states(self) -> dict[str, InstanceState]:
        return {name: found.state for name, found in self.machine.instances.items()}


def test_service_starts_its_replicas_and_is_ready_with_the_last() -> None:
    driven = Driven(replicas=2, max_replicas=2)
    assert driven.effects == [StartInstance("web-1"), StartInstance("web-2")]
    assert driven.machine.state is ServiceState.STARTING
    driven.ready("web-1")
    assert driven.machine.state is ServiceState.DEGRADED
    driven.ready("web-2")
    assert driven.machine.state is ServiceState.READY
    assert driven.machine.next_deadline() is None


def test_service_waits_longer_after_each_failure_when_it_was_ready_once() -> None:
    driven = Driven()
    driven.ready("web-1")
    waits = []
    for number in range(1, 13):
        driven.tell(InstanceEnded(f"web-{number}", EXITED))
        assert driven.effects == []
        deadline = driven.machine.next_deadline()
        assert deadline is not None
        waits.append(deadline - driven.now)
        assert driven.advance(waits[-1]) == [StartInstance(f"web-{number + 1}")]
    assert 0.75 <= waits[0] <= 1.25
    assert all(0.75 * 2**index <= wait <= 1.25 * 2**index for index, wait in enumerate(waits[:8]))
    assert max(waits) <= 375
    assert driven.machine.restarts == 12
    assert driven.machine.starts.given_up is None


def test_detail_of_a_starting_instance_is_in_its_timeout() -> None:
    driven = Driven(start_timeout_s=10.0)
    driven.tell(InstanceWaits("web-1", "nothing runs yet"))
    assert driven.machine.instances["web-1"].detail == ""
    driven.tell(InstanceStarted("web-1", "n", "10.0.0.1"))
    driven.tell(InstanceWaits("web-1", "it does not listen on port 1"))
    assert driven.machine.instances["web-1"].detail == "it does not listen on port 1"
    assert driven.advance(10.0) == [StopInstance("web-1", SPEC.stop_grace_s)]
    driven.tell(InstanceWaits("web-1", "too late"))
    driven.tell(InstanceEnded("web-1", None))
    found = driven.machine.starts.last
    assert found is not None
    assert found.message == "it was not ready within 10 s: it does not listen on port 1"


def test_detail_of_an_instance_that_waited_is_gone_when_it_is_ready() -> None:
    driven = Driven()
    driven.tell(InstanceStarted("web-1", "n", "10.0.0.1"))
    driven.tell(InstanceWaits("web-1", "it does not listen on port 1"))
    driven.tell(InstanceReady("web-1", "127.0.0.1:1"))
    driven.tell(InstanceWaits("web-1", "a report that was late"))
    assert driven.machine.instances["web-1"].detail == ""


@pytest.mark.parametrize(
    ("kind", "is_told"),
    [("exited", True), ("signaled", True), ("out_of_memory", True), ("port_in_use", False), ("lost", False)],
)
def test_starter_is_told_of_a_failure_that_is_the_programs_own(kind: str, is_told: bool) -> None:
    driven = Driven()
    starts = driven.machine.starts
    assert not starts.has_told(0)
    driven.tell(InstanceStarted("web-1", "n", "10.0.0.1"))
    driven.tell(InstanceEnded("web-1", ServiceFailure(FailureKind(kind), "why")))
    assert starts.has_told(0) is is_told
    assert not starts.has_told(1), "a caller that knows of it waits for the next one"
    driven.advance(2.0)
    driven.ready("web-2")
    driven.tell(InstanceEnded("web-2", EXITED))
    assert not starts.has_told(1), "it was ready once"


def test_failures_are_counted_anew_when_an_instance_was_ready_for_long() -> None:
    driven = Driven()
    driven.ready("web-1")
    for number in (1, 2, 3):
        driven.tell(InstanceEnded(f"web-{number}", EXITED))
        driven.advance(10)
    driven.ready("web-4")
    driven.advance(STABLE_S)
    driven.tell(InstanceEnded("web-4", EXITED))
    assert driven.machine.starts.failures == 1


def test_service_gives_up_at_once_when_another_start_would_fail_alike() -> None:
    driven = Driven()
    driven.tell(InstanceStarted("web-1", "n", ""))
    driven.tell(InstanceEnded("web-1", NO_COMMAND))
    assert driven.machine.state is ServiceState.FAILED
    assert driven.machine.starts.given_up == NO_COMMAND
    assert driven.machine.next_deadline() is None
    assert driven.tell(Defined(SPEC)) == [StartInstance("web-2")]
    assert driven.machine.state is ServiceState.STARTING


def test_service_gives_up_when_a_definition_that_was_never_ready_fails_too_often() -> None:
    driven = Driven()
    for number in range(1, MAX_FAILURES + 1):
        driven.tell(InstanceEnded(f"web-{number}", EXITED))
        driven.advance(60)
    assert driven.machine.state is ServiceState.FAILED
    assert driven.machine.restarts == MAX_FAILURES


def test_instance_is_stopped_with_the_timeout_as_cause_when_it_is_not_ready_in_time() -> None:
    driven = Driven(start_timeout_s=20.0, stop_grace_s=3.0)
    driven.tell(InstanceStarted("web-1", "n", ""))
    assert driven.machine.next_deadline() == 20
    assert driven.advance(20) == [StopInstance("web-1", 3.0)]
    killed = ServiceFailure(FailureKind.SIGNALED, "killed", signal=15, last_lines=("loading",))
    driven.tell(InstanceEnded("web-1", killed))
    cause = driven.machine.starts.last
    assert cause is not None
    assert (cause.kind, cause.last_lines) == (FailureKind.START_TIMEOUT, ("loading",))


def test_queued_instance_has_no_start_timeout() -> None:
    driven = Driven(start_timeout_s=1.0)
    assert driven.machine.next_deadline() is None
    assert driven.advance(1000) == []


def test_instance_loses_its_route_and_is_replaced_when_its_checks_fail() -> None:
    driven = Driven(health=HealthCheck(failures=2))
    driven.ready("web-1")
    driven.tell(InstanceUnhealthy("web-1", 1, "slow"))
    assert driven.machine.ready
    driven.tell(InstanceUnhealthy("web-1", 2, "slow"))
    assert not driven.machine.ready
    assert driven.states() == {"web-1": InstanceState.UNHEALTHY}
    driven.tell(InstanceReady("web-1", "127.0.0.1:1"))
    assert driven.machine.state is ServiceState.READY
    for failures in (2, 3, 4):
        driven.tell(InstanceUnhealthy("web-1", failures, "slow"))
    assert driven.states()["web-1"] is InstanceState.STOPPING
    driven.tell(InstanceEnded("web-1", None))
    assert driven.machine.starts.last is not None
    assert driven.machine.starts.last.kind is FailureKind.UNHEALTHY


def test_service_ends_with_its_last_instance_when_it_is_stopped() -> None:
    driven = Driven(replicas=2, max_replicas=2, drain_timeout_s=5.0)
    driven.ready("web-1")
    driven.tell(LoadReported("web-1", 1))
    assert driven.tell(Stopped()) == [CancelInstance("web-2")]
    assert driven.states() == {"web-1": InstanceState.DRAINING, "web-2": InstanceState.STOPPING}
    driven.tell(InstanceEnded("web-2", None))
    assert driven.tell(LoadReported("web-1", 0)) == [StopInstance("web-1", 10.0)]
    assert driven.tell(InstanceEnded("web-1", None)) == [ServiceGone()]
    assert driven.machine.restarts == 0


def test_instance_that_drains_is_stopped_when_its_requests_take_too_long() -> None:
    driven = Driven(drain_timeout_s=5.0)
    driven.ready("web-1")
    driven.tell(LoadReported("web-1", 3))
    assert driven.tell(Stopped()) == []
    assert driven.advance(5) == [StopInstance("web-1", 10.0)]


def test_idle_service_has_no_instance_until_it_is_used() -> None:
    driven = Driven(idle_timeout_s=30.0)
    driven.ready("web-1")
    driven.tell(LoadReported("web-1", 1))
    driven.advance(100)
    assert driven.machine.state is ServiceState.READY
    driven.tell(LoadReported("web-1", 0))
    assert driven.machine.next_deadline() == driven.now + 30
    driven.advance(29)
    driven.tell(UseChanged(0, 1))
    driven.advance(1000)
    driven.tell(UseChanged(0, 0))
    assert driven.advance(29) == []
    assert driven.advance(1) == [StopInstance("web-1", 10.0)]
    driven.tell(InstanceEnded("web-1", None))
    assert driven.machine.state is ServiceState.IDLE
    assert driven.tell(UseChanged(1, 0)) == [StartInstance("web-2")]
    assert driven.tell(UseChanged(3, 0)) == []


def test_instance_that_starts_is_not_stopped_for_being_idle() -> None:
    driven = Driven(idle_timeout_s=5.0, start_timeout_s=1000.0)
    driven.tell(InstanceStarted("web-1", "n", ""))
    assert driven.advance(500) == []
    driven.tell(InstanceReady("web-1", "127.0.0.1:1"))
    assert driven.advance(4) == []
    assert driven.advance(1) == [StopInstance("web-1", 10.0)]


def test_service_without_replicas_starts_with_its_first_use() -> None:
    driven = Driven(replicas=0, idle_timeout_s=10.0)
    assert driven.machine.state is ServiceState.IDLE
    assert driven.tell(UseChanged(1, 0)) == [StartInstance("web-1")]


def test_load_starts_instances_at_most_twice_as_many_and_stops_them_after_a_while() -> None:
    driven = Driven(max_replicas=8, concurrency=2)
    driven.ready("web-1")
    assert driven.tell(LoadReported("web-1", 12)) == [StartInstance("web-2")]
    assert driven.ready("web-2") == [StartInstance("web-3"), StartInstance("web-4")]
    assert driven.ready("web-3") == [StartInstance("web-5"), StartInstance("web-6")]
    driven.tell(LoadReported("web-1", 1))
    assert driven.advance(SHRINK_DELAY_S - 1) == []
    driven.advance(1)
    assert [name for name, state in driven.states().items() if state is InstanceState.READY] == ["web-1"]


def test_scaling_keeps_the_busiest_instances() -> None:
    driven = Driven(replicas=3, max_replicas=3)
    for name in ("web-1", "web-2", "web-3"):
        driven.ready(name)
    driven.tell(LoadReported("web-2", 5))
    driven.tell(Scaled(1, 1))
    assert driven.states() == {
        "web-1": InstanceState.STOPPING,
        "web-2": InstanceState.READY,
        "web-3": InstanceState.STOPPING,
    }


def test_older_instances_serve_until_those_of_a_new_definition_are_ready() -> None:
    driven = Driven()
    driven.ready("web-1")
    assert driven.tell(Defined(replace(SPEC, command=("other",)))) == [StartInstance("web-2")]
    driven.tell(InstanceStarted("web-2", "n", ""))
    driven.advance(REPLACE_WAIT_S * 2)
    assert driven.states()["web-1"] is InstanceState.READY
    driven.tell(InstanceReady("web-2", "127.0.0.1:2"))
    assert driven.states()["web-1"] is InstanceState.STOPPING


def test_older_instances_make_room_when_a_new_definition_waits_for_resources() -> None:
    driven = Driven()
    driven.ready("web-1")
    driven.tell(Defined(replace(SPEC, command=("other",))))
    assert driven.machine.next_deadline() == REPLACE_WAIT_S
    assert driven.advance(REPLACE_WAIT_S) == [StopInstance("web-1", 10.0)]


def test_instances_leave_a_node_that_accepts_no_leases() -> None:
    driven = Driven()
    driven.ready("web-1")
    driven.tell(LoadReported("web-1", 1))
    assert driven.tell(NodesChanged(frozenset({"n", "other"}))) == []
    assert driven.tell(NodesChanged(frozenset({"other"}))) == [StartInstance("web-2")]
    assert driven.states() == {"web-1": InstanceState.DRAINING, "web-2": InstanceState.QUEUED}
    assert driven.machine.restarts == 0


def test_service_outside_of_the_cluster_is_ready_without_instances() -> None:
    driven = Driven(replace(SPEC, command=(), base_url="https://api.example.com/v1"))
    assert (driven.effects, driven.machine.state) == ([], ServiceState.READY)
    driven.tell(UseChanged(1, 1))
    assert (driven.live, driven.machine.takes_requests) == (set(), True)
    assert driven.tell(Stopped()) == [ServiceGone()]
    assert not driven.machine.takes_requests


def test_an_equal_definition_changes_nothing() -> None:
    driven = Driven()
    driven.ready("web-1")
    assert driven.tell(Defined(replace(SPEC))) == []
    assert driven.machine.revision == 1


def test_facts_about_an_instance_that_has_ended_change_nothing() -> None:
    driven = Driven()
    driven.tell(InstanceEnded("web-1", EXITED))
    for event in (InstanceReady("web-1", "a:1"), LoadReported("web-1", 1), InstanceEnded("web-1", EXITED)):
        assert driven.tell(event) == []
    assert driven.machine.restarts == 1


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("started"), st.integers(0, 3)),
        st.tuples(st.just("ready"), st.integers(0, 3)),
        st.tuples(st.just("unhealthy"), st.integers(0, 3)),
        st.tuples(st.just("load"), st.integers(0, 12)),
        st.tuples(st.just("ended"), st.integers(0, 3)),
        st.tuples(st.just("failed"), st.integers(0, 3)),
        st.tuples(st.just("use"), st.integers(0, 2)),
        st.tuples(st.just("scale"), st.integers(0, 4)),
        st.tuples(st.just("define"), st.integers(0, 2)),
        st.tuples(st.just("nodes"), st.integers(0, 1)),
        st.tuples(st.just("stop"), st.just(0)),
        st.tuples(st.just("tick"), st.integers(1, 200)),
        st.tuples(st.just("deadline"), st.just(0)),
    ),
    max_size=40,
)


def take(driven: Driven, step: str, number: int) -> None:
    """Take one random step."""
    live = sorted(driven.live)
    name = live[number % len(live)] if live else "web-0"
    instance = driven.machine.instances.get(name)
    match step:
        case "started":
            driven.tell(InstanceStarted(name, "n", "ip"))
        case "ready" if instance is not None and instance.node_id:
            driven.tell(InstanceReady(name, "a:1"))
        case "unhealthy":
            driven.tell(InstanceUnhealthy(name, 3 * (number + 1), "slow"))
        case "load" if instance is not None and instance.node_id:
            driven.tell(LoadReported(name, number))
        case "ended" | "failed" if live:
            driven.tell(InstanceEnded(name, EXITED if step == "failed" else None))
        case "use":
            driven.tell(UseChanged(number, number // 2))
        case "scale":
            driven.tell(Scaled(number, max(1, number)))
        case "define":
            driven.tell(Defined(replace(driven.machine.spec, command=(str(number),))))
        case "nodes":
            driven.tell(NodesChanged(frozenset({"n"} if number else ())))
        case "stop":
            driven.tell(Stopped())
        case "tick":
            driven.advance(number)
        case "deadline" if (deadline := driven.machine.next_deadline()) is not None:
            driven.advance(max(0.0, deadline - driven.now))
        case _:
            pass


@given(STEPS, st.integers(0, 2), st.booleans(), st.booleans())
def test_invariants_hold_after_any_steps_and_a_stop_ends_everything(
    steps: list[tuple[str, int]], replicas: int, has_idle: bool, has_concurrency: bool
) -> None:
    driven = Driven(
        replicas=replicas,
        max_replicas=max(1, 2 * replicas),
        idle_timeout_s=20.0 if has_idle else None,
        concurrency=2 if has_concurrency else None,
    )
    for step, number in steps:
        if driven.machine.is_gone:
            break
        take(driven, step, number)
        assert driven.live == set(driven.machine.instances)
    if not driven.machine.is_gone:
        driven.tell(Stopped())
    for _ in range(100):
        if driven.machine.is_gone:
            break
        for name in sorted(driven.live):
            if driven.machine.instances[name].state is InstanceState.STOPPING:
                driven.tell(InstanceEnded(name, None))
        deadline = driven.machine.next_deadline()
        if deadline is not None:
            driven.advance(max(0.0, deadline - driven.now))
    assert driven.machine.is_gone
    assert not driven.live


@given(STEPS)
def test_the_same_events_decide_the_same(steps: list[tuple[str, int]]) -> None:
    first, second = Driven(), Driven()
    for step, number in steps:
        if first.machine.is_gone:
            break
        take(first, step, number)
        take(second, step, number)
        assert first.effects == second.effects


@given(st.lists(st.sampled_from([EXITED, NO_COMMAND]), max_size=8))
def test_a_service_that_was_ready_never_gives_up(failures: list[ServiceFailure]) -> None:
    driven = Driven()
    driven.ready("web-1")
    for failure in failures:
        (name,) = driven.live
        driven.tell(InstanceEnded(name, failure))
        deadline = driven.machine.next_deadline()
        assert deadline is not None
        assert driven.advance(deadline - driven.now) == [StartInstance(next(iter(driven.live)))]


def test_service_is_not_used_by_requests_of_instances_that_leave() -> None:
    driven = Driven(idle_timeout_s=5.0)
    driven.ready("web-1")
    driven.advance(5)
    assert driven.states()["web-1"] is InstanceState.STOPPING
    driven.tell(LoadReported("web-1", 1))
    assert driven.machine.wanted == 0


@pytest.mark.parametrize("state", InstanceState)
def test_every_state_has_a_row_in_the_table(state: InstanceState) -> None:
    assert state not in INSTANCE_TRANSITIONS[state]
