"""The scheduler's machine: examples, and random histories with every invariant checked after each step."""

from lattice_server.core.messages import (
    Assign,
    AttemptFailed,
    AttemptStarted,
    AttemptSucceeded,
    LeaseReturned,
    RevokeLease,
    SchedulerEffect,
    TaskFailed,
    TaskReady,
    TaskRetrying,
    TaskReturned,
    TaskSucceeded,
    WelcomeWorker,
    WorkerDetached,
    WorkerLost,
)
from lattice_server.core.model import Failure, FailureKind, OutputRef, Resources, RetryPolicy
from lattice_server.core.scheduling.scheduler import Scheduler
from tests.server.core.graphs import VALUE, hello, task

BROKEN = Failure(FailureKind.USER_ERROR, "broken")
STOPPED = Failure(FailureKind.CANCELLED, "stopped")


def ready(task_id: str, cpu: float = 1.0, after: str = "", **settings_: object) -> TaskReady:
    inputs = {"x": OutputRef(after, "out")} if after else {}
    return TaskReady("r", task(task_id, resources=Resources(cpu), **settings_), inputs, 0, after)


def succeeded(lease: Assign, duration_s: float = 0.001) -> AttemptSucceeded:
    return AttemptSucceeded(lease.session_id, lease.lease_id, 0, {"out": VALUE}, duration_s)


def assigned(effects: list[SchedulerEffect]) -> list[Assign]:
    return [effect for effect in effects if isinstance(effect, Assign)]


def names(leases: list[Assign]) -> list[str]:
    return [attempt.task_id for lease in leases for attempt in lease.attempts]


def test_no_more_runs_than_there_are_cpus() -> None:
    machine = Scheduler("e")
    machine.handle(hello("n", cpu=2), 0.0)
    effects = machine.handle_all([ready(f"t{i}") for i in range(5)], 0.0)
    assert names(assigned(effects)) == ["t0", "t1"]
    first = assigned(effects)[0]
    done = AttemptSucceeded(first.session_id, first.lease_id, 0, {}, duration_s=5.0)
    assert names(assigned(machine.handle(done, 5.0))) == ["t2"]
    machine.check()


def test_a_small_task_passes_a_big_one_that_waits() -> None:
    machine = Scheduler("e")
    machine.handle(hello("n", cpu=2), 0.0)
    effects = machine.handle_all([ready("first", 1), ready("big", 2), ready("small", 1)], 0.0)
    assert names(assigned(effects)) == ["first", "small"]


def test_short_work_is_sent_ahead_and_taken_back_from_behind_a_long_attempt() -> None:
    machine = Scheduler("e")
    machine.handle(hello("n", cpu=1), 0.0)
    first = assigned(machine.handle(ready("first"), 0.0))[0]
    machine.handle(AttemptSucceeded(first.session_id, first.lease_id, 0, {}, duration_s=0.001), 0.001)
    effects = machine.handle_all([ready(f"t{i}") for i in range(3)], 1.0)
    ahead = assigned(effects)
    assert [a.slot for a in ahead] == [ahead[0].slot] * 3
    deadline = machine.next_deadline()
    assert deadline is not None
    revoked = [e.lease_id for e in machine.tick(deadline) if isinstance(e, RevokeLease)]
    assert revoked == [a.lease_id for a in ahead[1:]]
    machine.handle(LeaseReturned(ahead[1].session_id, ahead[1].lease_id, ""), deadline)
    machine.check()


def warmed(cpu: float = 1.0) -> Scheduler:
    """A scheduler that knows its tasks to be short."""
    machine = Scheduler("e")
    machine.handle(hello("n", cpu=cpu), 0.0)
    machine.handle(succeeded(assigned(machine.handle(ready("warm"), 0.0))[0]), 0.0)
    return machine


CHAIN = [ready("a"), ready("b", after="a"), ready("c", after="b")]


def test_a_chain_of_short_tasks_goes_out_together_and_in_order() -> None:
    machine = warmed()
    a, b, c = assigned(machine.handle_all(CHAIN, 0.0))
    assert (a.slot, a.after_lease_id) == (b.slot, "")
    assert (b.after_lease_id, c.after_lease_id) == (a.lease_id, b.lease_id)
    effects = machine.handle_all([succeeded(a), succeeded(b), succeeded(c)], 0.1)
    assert [e.task_id for e in effects if isinstance(e, TaskSucceeded)] == ["a", "b", "c"]
    machine.check()


def test_follower_of_a_long_task_gets_its_outputs_when_it_starts() -> None:
    machine = Scheduler("e")
    machine.handle(hello("n"), 0.0)
    (a,) = assigned(machine.handle_all(CHAIN[:2], 0.0))
    (b,) = assigned(machine.handle(succeeded(a, duration_s=5.0), 5.0))
    assert (b.attempts[0].inputs, b.after_lease_id) == ({"x": VALUE}, "")


def test_chain_is_returned_when_its_first_task_fails_and_sent_again_with_the_retry() -> None:
    machine = warmed()
    retried = ready("a", retry=RetryPolicy(max_attempts=2, initial_backoff_s=1.0))
    a, b, c = assigned(machine.handle_all([retried, *CHAIN[1:]], 0.0))
    back = [LeaseReturned(lease.session_id, lease.lease_id, "") for lease in (b, c)]
    machine.handle_all([AttemptFailed(a.session_id, a.lease_id, 0, BROKEN), *back], 0.1)
    machine.check()
    assert [(x.attempts[0].task_id, x.attempts[0].attempt) for x in assigned(machine.tick(1.2))] == [
        ("a", 2),
        ("b", 1),
        ("c", 1),
    ]


def test_followers_are_forgotten_when_their_task_fails() -> None:
    machine = warmed()
    a, b, c = assigned(machine.handle_all(CHAIN, 0.0))
    machine.handle(AttemptFailed(a.session_id, a.lease_id, 0, BROKEN), 0.1)
    machine.check()
    machine.handle_all([LeaseReturned(lease.session_id, lease.lease_id, "") for lease in (b, c)], 0.1)
    assert not machine.tasks
    machine.check()


def test_a_follower_of_a_task_that_ended_is_handed_back() -> None:
    machine = warmed()
    assert machine.handle(ready("b", after="gone"), 0.0) == [TaskReturned("r", "b")]


def test_a_lost_worker_is_retried_three_times() -> None:
    machine = Scheduler("e")
    machine.handle(ready("t"), 0.0)
    ends: list[type] = []
    for now in range(3):
        lease = assigned(machine.handle(hello("n"), float(now)))[0]
        machine.handle(AttemptStarted(lease.session_id, lease.lease_id, 0), float(now))
        effects = machine.handle(WorkerLost("worker-of-n", "killed"), float(now))
        ends += [type(e) for e in effects if isinstance(e, TaskRetrying | TaskFailed)]
        machine.check()
    assert ends == [TaskRetrying, TaskRetrying, TaskFailed]


def test_a_worker_that_comes_back_in_time_keeps_its_leases() -> None:
    machine = Scheduler("e", session_ttl_s=10.0)
    effects = machine.handle_all([ready("t"), hello("n")], 0.0)
    lease = assigned(effects)[0]
    machine.handle(WorkerDetached(lease.session_id), 1.0)
    welcome = machine.handle(hello("n", session_id=lease.session_id, held=[lease.lease_id, "stale"]), 2.0)
    assert welcome == [WelcomeWorker("worker-of-n", lease.session_id, True, ("stale",))]
    done = succeeded(lease, 1.0)
    assert any(isinstance(e, TaskSucceeded) for e in machine.handle(done, 3.0))


def test_a_late_report_of_a_lost_session_is_ignored() -> None:
    machine = Scheduler("e", session_ttl_s=10.0)
    lease = assigned(machine.handle_all([ready("t"), hello("n")], 0.0))[0]
    machine.handle(WorkerDetached(lease.session_id), 1.0)
    machine.tick(20.0)
    assert machine.handle(AttemptSucceeded(lease.session_id, lease.lease_id, 0, {}, 1.0), 21.0) == []
    machine.check()
