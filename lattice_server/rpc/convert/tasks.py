"""Owns the translation of what workflows are made of: functions, policies, tasks. Rule: a bad field is named."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from lattice.v1 import task_pb2

from lattice_server.core.errors import invalid_field
from lattice_server.core.model import (
    BatchPolicy,
    BatchScope,
    Bundle,
    Condition,
    Function,
    Isolation,
    RetryPolicy,
    TaskSpec,
)
from lattice_server.core.scheduling.batching import BatchRule, by_rule
from lattice_server.rpc.convert.payloads import (
    FAILURE_KIND_FROM_PROTO,
    ISOLATION_FROM_PROTO,
    binding_from_proto,
    output_from_proto,
    payload_from_proto,
    resources_from_proto,
    runtime_from_proto,
    seconds_from,
)
from lattice_server.rpc.digests import digest_of

MAX_ID_LENGTH = 128
MAX_ATTEMPTS = 10_000
MAX_WAIT_S = 30 * 24 * 3600.0
MAX_MULTIPLIER = 1000.0
MAX_BATCH = 100_000
MAX_PARALLEL = (1 << 31) - 1
DEFAULT_RETRY = RetryPolicy()

Number = TypeVar("Number", int, float)

BATCH_SCOPE_FROM_PROTO = {
    task_pb2.BATCH_SCOPE_UNSPECIFIED: BatchScope.SERVER,
    task_pb2.BATCH_SCOPE_SERVER: BatchScope.SERVER,
    task_pb2.BATCH_SCOPE_RUN: BatchScope.RUN,
}


def check_id(own_id: str, field: str) -> None:
    """Raise InvalidError for the id of a run or a workflow, or the name of a tenant, that is not well-formed."""
    if len(own_id) > MAX_ID_LENGTH or "\n" in own_id:
        raise invalid_field(field, f"must have at most {MAX_ID_LENGTH} characters and no line break")


def check_request_id(request_id: str) -> None:
    """Raise InvalidError for a request id that is too long."""
    if len(request_id) > MAX_ID_LENGTH:
        raise invalid_field("request_id", f"must have at most {MAX_ID_LENGTH} characters")


def function_from_proto(message: task_pb2.Function, bundle_of: Callable[[str], Bundle]) -> Function:
    """Return a function that came with its code, named by the digest of what came."""
    kept = task_pb2.Function()
    kept.CopyFrom(message)
    kept.digest = digest_of(message)
    bundle = bundle_of(message.bundle_digest) if message.bundle_digest else None
    is_async = message.python.concurrency == task_pb2.CONCURRENCY_ASYNC
    runtime = runtime_from_proto(message.runtime)
    return Function(kept.digest, is_async, kept, bundle, message.entrypoint, runtime, message.ByteSize())


def bundle_from_proto(message: task_pb2.CodeBundle) -> Bundle:
    """Return a bundle that came with its content."""
    return Bundle(message.digest, task_pb2.CodeBundle(digest=message.digest, zip=message.zip), len(message.zip))


def code_to_proto(function: Function) -> tuple[task_pb2.Function, task_pb2.CodeBundle | None]:
    """Return a function's code and its bundle, as they came."""
    code, bundle = function.definition, None if function.bundle is None else function.bundle.content
    assert isinstance(code, task_pb2.Function)
    assert bundle is None or isinstance(bundle, task_pb2.CodeBundle)
    return code, bundle


def wait_from_proto(message: Duration, field: str) -> float:
    """Return how long something may wait, in seconds. Raises InvalidError when it is negative or beyond a month."""
    seconds = seconds_from(message)
    if not 0 <= seconds <= MAX_WAIT_S:
        raise invalid_field(field, f"must be from 0 to {MAX_WAIT_S:.0f} s")
    return seconds


def limit_from_proto(message: Message, name: str, field: str) -> float | None:
    """Return the limit that a message has by this name, in seconds; None when it is unset. Raises InvalidError."""
    if not message.HasField(name):
        return None
    seconds = seconds_from(getattr(message, name))
    if not 0 < seconds <= MAX_WAIT_S:
        raise invalid_field(field, f"must be above 0 and at most {MAX_WAIT_S:.0f} s; leave it out for no limit")
    return seconds


def _number(message: Message, name: str, field: str, bounds: tuple[float, float], default: Number) -> Number:
    """Return the number that a message has by this name, within bounds; the default when it is unset.

    Raises InvalidError.
    """
    if not message.HasField(name):
        return default
    value: Number = getattr(message, name)
    least, most = bounds
    if not least <= value <= most:
        raise invalid_field(f"{field}.{name}", f"must be from {least:.0f} to {most:.0f}")
    return value


def retry_from_proto(message: task_pb2.RetryPolicy, field: str) -> RetryPolicy:
    """Return a retry policy with defaults filled in. Raises InvalidError."""
    unknown = [kind for kind in message.retry_on if kind not in FAILURE_KIND_FROM_PROTO]
    if unknown:
        raise invalid_field(f"{field}.retry_on", f"there is no kind of failure {unknown[0]}")
    default = DEFAULT_RETRY
    initial_s, most_s = default.initial_backoff_s, default.max_backoff_s
    if message.HasField("initial_backoff"):
        initial_s = wait_from_proto(message.initial_backoff, f"{field}.initial_backoff")
    if message.HasField("max_backoff"):
        most_s = wait_from_proto(message.max_backoff, f"{field}.max_backoff")
    return RetryPolicy(
        max_attempts=_number(message, "max_attempts", field, (1, MAX_ATTEMPTS), default.max_attempts),
        initial_backoff_s=initial_s,
        backoff_multiplier=_number(
            message, "backoff_multiplier", field, (1, MAX_MULTIPLIER), default.backoff_multiplier
        ),
        max_backoff_s=most_s,
        retry_on=frozenset(FAILURE_KIND_FROM_PROTO[kind] for kind in message.retry_on) or default.retry_on,
        retry_on_types=frozenset(message.retry_on_types),
        max_worker_losses=_number(message, "max_worker_losses", field, (1, MAX_ATTEMPTS), default.max_worker_losses),
    )


def task_from_proto(
    message: task_pb2.TaskSpec,
    field: str,
    functions: Mapping[str, Function],
    inline_limit_bytes: int,
    rules: Sequence[BatchRule] = (),
) -> TaskSpec:
    """Check and return one task. Raises InvalidError naming the field."""
    task_id = message.task_id
    if not task_id or len(task_id) > MAX_ID_LENGTH or "\n" in task_id:
        raise invalid_field(f"{field}.task_id", f"must have 1 to {MAX_ID_LENGTH} characters and no line break")
    function = functions.get(message.function)
    if function is None:
        offered = ", ".join(sorted(functions)) or "none"
        raise invalid_field(f"{field}.function", f"there is no function {message.function!r}; defined: {offered}")
    if len(set(message.outputs)) != len(message.outputs):
        raise invalid_field(f"{field}.outputs", "an output is named twice")
    isolation = ISOLATION_FROM_PROTO.get(message.isolation)
    if isolation is None or isolation is Isolation.DOCKER:
        raise invalid_field(f"{field}.isolation", "this server has no worker that can set up this isolation")
    inputs = {
        name: binding_from_proto(binding, f'{field}.inputs["{name}"]', inline_limit_bytes)
        for name, binding in message.inputs.items()
    }
    return TaskSpec(
        task_id=task_id,
        function=function,
        display_name=message.display_name or task_id,
        inputs=inputs,
        outputs=tuple(message.outputs),
        after=tuple(message.after),
        resources=resources_from_proto(message.resources, f"{field}.resources", is_async=function.is_async),
        retry=retry_from_proto(message.retry, f"{field}.retry") if message.HasField("retry") else DEFAULT_RETRY,
        attempt_timeout_s=limit_from_proto(message.timeout, "attempt", f"{field}.timeout.attempt"),
        isolation=isolation,
        node_selector=tuple(sorted(message.node_selector.items())),
        priority=message.priority,
        total_timeout_s=limit_from_proto(message.timeout, "total", f"{field}.timeout.total"),
        batch=batch_from_proto(message, field, rules) if message.HasField("batch") else None,
        max_parallel=_number(message, "max_parallel", field, (1, MAX_PARALLEL), 0),
        concurrency_key=message.concurrency_key,
        over=message.over,
        condition=condition_from_proto(message.condition, f"{field}.condition", inline_limit_bytes)
        if message.HasField("condition")
        else None,
    )


def batch_from_proto(message: task_pb2.TaskSpec, field: str, rules: Sequence[BatchRule]) -> BatchPolicy:
    """Return how a task is batched, by the server's rules or its own policy. Raises InvalidError."""
    batch = message.batch
    if not 1 <= batch.max_size <= MAX_BATCH:
        raise invalid_field(f"{field}.batch.max_size", f"must be from 1 to {MAX_BATCH}")
    scope = BATCH_SCOPE_FROM_PROTO.get(batch.scope)
    if scope is None:
        raise invalid_field(f"{field}.batch.scope", f"there is no scope {batch.scope}")
    wait_s = wait_from_proto(batch.max_wait, f"{field}.batch.max_wait")
    return by_rule(message.display_name or message.task_id, BatchPolicy(batch.max_size, wait_s, scope), rules)


def condition_from_proto(message: task_pb2.Condition, field: str, inline_limit_bytes: int) -> Condition:
    """Return a condition. Raises InvalidError."""
    if not message.HasField("output"):
        raise invalid_field(f"{field}.output", "a condition needs an output")
    equals = None
    if message.HasField("equals"):
        equals = payload_from_proto(message.equals, f"{field}.equals", inline_limit_bytes)
        if not isinstance(equals.content, str):
            raise invalid_field(f"{field}.equals", "must be JSON")
    return Condition(output_from_proto(message.output, f"{field}.output"), equals, message.negated)


def tasks_from_proto(
    messages: Iterable[task_pb2.TaskSpec],
    functions: Mapping[str, Function],
    inline_limit_bytes: int,
    rules: Sequence[BatchRule] = (),
) -> tuple[TaskSpec, ...]:
    """Check and return tasks, in order."""
    return tuple(
        task_from_proto(message, f"tasks[{index}]", functions, inline_limit_bytes, rules)
        for index, message in enumerate(messages)
    )
