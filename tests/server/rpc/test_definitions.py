"""What the fields of a task's policies mean when they are zero, and when they are left out."""

import pytest
from google.protobuf.duration_pb2 import Duration
from lattice.v1 import task_pb2

from lattice_server.core.model import RetryPolicy
from lattice_server.rpc.definitions import retry_from_proto

HALF_S = Duration(nanos=500_000_000)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, RetryPolicy()),
        ({"initial_backoff": Duration()}, RetryPolicy(initial_backoff_s=0.0)),
        ({"initial_backoff": HALF_S}, RetryPolicy(initial_backoff_s=0.5)),
        ({"max_backoff": Duration()}, RetryPolicy(max_backoff_s=0.0)),
        ({"max_backoff": HALF_S}, RetryPolicy(max_backoff_s=0.5)),
        ({"max_attempts": 0, "backoff_multiplier": 0.0, "max_worker_losses": 0}, RetryPolicy()),
        ({"max_attempts": 7, "backoff_multiplier": 1.5}, RetryPolicy(max_attempts=7, backoff_multiplier=1.5)),
    ],
)
def test_a_wait_of_zero_is_zero_and_one_left_out_is_the_default(given: dict[str, object], wanted: RetryPolicy) -> None:
    assert retry_from_proto(task_pb2.RetryPolicy(**given), "retry") == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["initial_backoff_s", "max_backoff_s"])
def test_no_attempt_waits_when_the_wait_is_zero(name: str) -> None:
    policy = RetryPolicy(max_attempts=10_000, backoff_multiplier=1000.0, **{name: 0.0})  # type: ignore[arg-type]
    assert {policy.backoff_s(failed) for failed in (1, 2, 100, 9_999)} == {0.0}
