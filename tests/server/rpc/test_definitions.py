"""Policies of tasks with fields that are zero, and fields that are unset."""

from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from lattice.v1 import task_pb2

from lattice_server.core.errors import InvalidError
from lattice_server.core.model import Function, RetryPolicy
from lattice_server.rpc.convert.tasks import retry_from_proto, task_from_proto

HALF_S = Duration(nanos=500_000_000)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, RetryPolicy()),
        ({"initial_backoff": Duration()}, RetryPolicy(initial_backoff_s=0.0)),
        ({"initial_backoff": HALF_S}, RetryPolicy(initial_backoff_s=0.5)),
        ({"max_backoff": Duration()}, RetryPolicy(max_backoff_s=0.0)),
        ({"max_backoff": HALF_S}, RetryPolicy(max_backoff_s=0.5)),
        ({"max_worker_losses": 1}, RetryPolicy(max_worker_losses=1)),
        ({"max_attempts": 7, "backoff_multiplier": 1.5}, RetryPolicy(max_attempts=7, backoff_multiplier=1.5)),
    ],
)
def test_wait_has_its_default_only_when_it_is_unset(given: dict[str, object], wanted: RetryPolicy) -> None:
    assert retry_from_proto(task_pb2.RetryPolicy(**given), "retry") == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["initial_backoff_s", "max_backoff_s"])
def test_no_attempt_waits_when_the_wait_is_zero(name: str) -> None:
    policy = RetryPolicy(max_attempts=10_000, backoff_multiplier=1000.0, **{name: 0.0})  # type: ignore[arg-type]
    assert {policy.backoff_s(failed) for failed in (1, 2, 100, 9_999)} == {0.0}


def zero(name: str) -> task_pb2.TaskSpec:
    """Return a task whose field of this name is set to zero."""
    found = task_pb2.TaskSpec(task_id="t", function="f")
    *path, last = name.split(".")
    message: Any = found
    for step in path:
        message = getattr(message, step)
    if message.DESCRIPTOR.fields_by_name[last].message_type is None:
        setattr(message, last, 0)
    else:
        getattr(message, last).SetInParent()
    return found


@pytest.mark.parametrize(
    "name",
    [
        "max_parallel",
        "retry.max_attempts",
        "retry.backoff_multiplier",
        "retry.max_worker_losses",
        "timeout.attempt",
        "timeout.total",
        "batch.max_size",
    ],
)
def test_task_is_refused_by_the_field_when_zero_would_mean_nothing(name: str) -> None:
    with pytest.raises(InvalidError) as caught:
        task_from_proto(zero(name), "tasks[0]", {"f": Function("sha256:0", False, None)}, 1)
    assert [violation.field for violation in caught.value.violations] == [f"tasks[0].{name}"]


def test_task_has_defaults_when_its_policies_are_left_out() -> None:
    message = task_pb2.TaskSpec(task_id="t", function="f")
    spec = task_from_proto(message, "tasks[0]", {"f": Function("sha256:0", False, None)}, 1)
    assert (spec.max_parallel, spec.retry, spec.batch) == (0, RetryPolicy(), None)
    assert (spec.attempt_timeout_s, spec.total_timeout_s) == (None, None)
