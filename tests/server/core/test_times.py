"""When attempts started and ended, as their workers tell and the ledger bounds it."""

import pytest

from lattice_server.core.messages import (
    AttemptFailed,
    AttemptLogged,
    AttemptStarted,
    AttemptSucceeded,
    TaskFailed,
    TaskStarted,
)
from lattice_server.core.messages import TaskSucceeded as Succeeded
from tests.server.core.graphs import VALUE
from tests.server.core.scenes import BROKEN, Scene, node, ready

SENT_AT, TOLD_AT = 10.0, 14.0


def scene() -> tuple[Scene, tuple[str, str, int]]:
    """Return a scene in which task `a` is with its worker, and how reports name its attempt."""
    found = Scene(node())
    found.tell(ready("a"), at=SENT_AT)
    lease = found.leases["a"]
    return found, (lease.session_id, lease.lease_id, 0)


def times(found: Scene, kind: type) -> list[float | None]:
    """Return the times of the last effects of a kind."""
    return [effect.at for effect in found.effects if isinstance(effect, kind)]


@pytest.mark.parametrize(("told", "true"), [(3.0, SENT_AT), (12.0, 12.0), (99.0, TOLD_AT), (None, TOLD_AT)])
def test_a_start_is_when_the_worker_says_but_not_before_the_lease_was_sent(told: float, true: float) -> None:
    found, named = scene()
    found.tell(AttemptStarted(*named, told), at=TOLD_AT)
    assert times(found, TaskStarted) == [true]


def test_an_attempt_ends_no_earlier_than_the_start_that_its_output_implies() -> None:
    for end in (
        lambda named: AttemptSucceeded(*named, {"out": VALUE}, 1.5, at=13.0),
        lambda named: AttemptFailed(*named, BROKEN, 1.5, at=13.0),
    ):
        found, named = scene()
        found.tell(AttemptLogged(*named, False, "text", False), end(named), at=TOLD_AT)
        assert times(found, TaskStarted) == [TOLD_AT]
        assert times(found, Succeeded) + times(found, TaskFailed) == [TOLD_AT]


def test_start_of_an_attempt_is_computed_from_its_end_when_it_was_not_reported() -> None:
    found, named = scene()
    found.tell(AttemptSucceeded(*named, {"out": VALUE}, 1.5, at=13.0), at=TOLD_AT)
    assert (times(found, TaskStarted), times(found, Succeeded)) == ([11.5], [13.0])
    found, named = scene()
    found.tell(AttemptFailed(*named, BROKEN, 99.0, at=13.0), at=TOLD_AT)
    assert (times(found, TaskStarted), times(found, TaskFailed)) == ([SENT_AT], [13.0])
