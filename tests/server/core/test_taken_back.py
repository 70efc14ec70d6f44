"""Leases that are revoked behind a long attempt, also while their worker is detached."""

from lattice_server.core.messages import (
    Assign,
    AttemptStarted,
    AttemptSucceeded,
    CancelRequested,
    LeaseReturned,
    RevokeLease,
    StopLease,
    TaskReady,
    WorkerDetached,
)
from lattice_server.core.model import Failure, FailureKind, RetryPolicy
from lattice_server.core.scheduling.scheduler import Scheduler
from tests.server.core.graphs import hello, task


def ready(task_id: str) -> TaskReady:
    return TaskReady("r", task(task_id), {}, 0)


def test_revoked_lease_is_not_sent_behind_the_same_attempt_again() -> None:
    machine = Scheduler("e")
    machine.handle(hello("n", cpu=1), 0.0)
    (first,) = [e for e in machine.handle(ready("first"), 0.0) if isinstance(e, Assign)]
    machine.handle(AttemptSucceeded(first.session_id, first.lease_id, 0, {}, 0.001), 0.001)
    effects = machine.handle_all([ready("long"), ready("short")], 1.0)
    sent = 0
    # The worker returns revoked leases at once; `long` runs for a second.
    while (due := machine.next_deadline()) is not None and due < 2.0:
        effects = machine.tick(due)
        given_back = [LeaseReturned(e.session_id, e.lease_id, "") for e in effects if isinstance(e, RevokeLease)]
        sent += sum(isinstance(e, Assign) for e in machine.handle_all(given_back, due))
        machine.check()
    assert sent == 0


def test_a_task_cancelled_while_its_worker_is_away_is_stopped_when_it_is_back() -> None:
    machine = Scheduler("e")
    effects = machine.handle_all([hello("n", cpu=1), ready("t")], 0.0)
    (lease,) = [e for e in effects if isinstance(e, Assign)]
    machine.handle(AttemptStarted(lease.session_id, lease.lease_id, 0), 1.0)
    machine.handle(WorkerDetached(lease.session_id), 2.0)
    machine.handle(CancelRequested("r", ("t",), Failure(FailureKind.CANCELLED, "stopped")), 3.0)
    effects = machine.handle(hello("n", 1, lease.session_id, [lease.lease_id]), 4.0)
    assert StopLease(lease.session_id, lease.lease_id) in effects


def test_a_wait_that_grows_beyond_all_bounds_is_the_longest_one() -> None:
    assert RetryPolicy(max_attempts=9, backoff_multiplier=1e200).backoff_s(3) == 30.0
