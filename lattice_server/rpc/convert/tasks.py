"""Converts task definitions and the explanation of a wait. Rule: an error names the bad field by its path."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import TypeVar

from google.protobuf.message import Message
from lattice.v1 import resources_pb2, run_pb2, task_pb2

from lattice_server.core.errors import InvalidError, invalid_field
from lattice_server.core.messages import Explanation, ReasonKind
from lattice_server.core.model import (
    BatchPolicy,
    BatchScope,
    Condition,
    Function,
    Isolation,
    RetryPolicy,
    TaskSpec,
)
from lattice_server.core.scheduling.batching import BatchRule, by_rule
from lattice_server.rpc.convert.environment import environment_from_proto, fill_environment
from lattice_server.rpc.convert.network import network_from_proto
from lattice_server.rpc.convert.payloads import (
    FAILURE_KIND_FROM_PROTO,
    FAILURE_KIND_TO_PROTO,
    binding_from_proto,
    fill_binding,
    output_from_proto,
    output_to_proto,
    payload_from_proto,
    payload_to_proto,
)
from lattice_server.rpc.convert.resources import (
    ISOLATION_TO_PROTO,
    RESOURCE_KIND_TO_PROTO,
    isolation_from_proto,
    resources_from_proto,
    resources_to_proto,
)
from lattice_server.rpc.convert.times import delay_from_proto, duration, limit_from_proto

MAX_ID_LENGTH = 128
MAX_ATTEMPTS = 10_000
MAX_MULTIPLIER = 1000.0
MAX_BATCH = 100_000
MAX_PARALLEL = (1 << 31) - 1
MAX_SERVICES = 16
DEFAULT_RETRY = RetryPolicy()
MAX_KEPT_BYTES = 512  # Of a retry policy that is kept for other tasks.

Number = TypeVar("Number", int, float)

BATCH_SCOPE_FROM_PROTO = {
    task_pb2.BATCH_SCOPE_UNSPECIFIED: BatchScope.SERVER,
    task_pb2.BATCH_SCOPE_SERVER: BatchScope.SERVER,
    task_pb2.BATCH_SCOPE_RUN: BatchScope.RUN,
}
BATCH_SCOPE_TO_PROTO = {
    core: proto for proto, core in BATCH_SCOPE_FROM_PROTO.items() if proto != task_pb2.BATCH_SCOPE_UNSPECIFIED
}
REASON_KIND_TO_PROTO = {kind: task_pb2.WaitKind.Value(f"WAIT_KIND_{kind.name}") for kind in ReasonKind}


def check_id(own_id: str, field: str) -> None:
    """Raise InvalidError for the id of a run or a workflow, or the name of a tenant, that is not well-formed."""
    if len(own_id) > MAX_ID_LENGTH or "\n" in own_id:
        raise invalid_field(field, f"must have at most {MAX_ID_LENGTH} characters and no line break")


def check_request_id(request_id: str) -> None:
    """Raise InvalidError for a request id that is too long."""
    if len(request_id) > MAX_ID_LENGTH:
        raise invalid_field("request_id", f"must have at most {MAX_ID_LENGTH} characters")


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
    data = message.SerializeToString()
    if len(data) <= MAX_KEPT_BYTES:
        with suppress(InvalidError):  # It is read again, to name the field.
            return _kept_retry(data)
    return _retry_from_proto(message, field)


@lru_cache(maxsize=1024)
def _kept_retry(data: bytes) -> RetryPolicy:
    # Most tasks have one of few policies, and to read one takes half as long as the rest of a task.
    return _retry_from_proto(task_pb2.RetryPolicy.FromString(data), "")


def _retry_from_proto(message: task_pb2.RetryPolicy, field: str) -> RetryPolicy:
    unknown = [kind for kind in message.retry_on if kind not in FAILURE_KIND_FROM_PROTO]
    if unknown:
        raise invalid_field(f"{field}.retry_on", f"there is no kind of failure {unknown[0]}")
    default = DEFAULT_RETRY
    initial_s, most_s = default.initial_backoff_s, default.max_backoff_s
    if message.HasField("initial_backoff"):
        initial_s = delay_from_proto(message.initial_backoff, f"{field}.initial_backoff")
    if message.HasField("max_backoff"):
        most_s = delay_from_proto(message.max_backoff, f"{field}.max_backoff")
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
    least: Isolation = Isolation.NONE,
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
    isolation = isolation_from_proto(message.isolation, least, f"{field}.isolation")
    inputs = {
        name: binding_from_proto(binding, f'{field}.inputs["{name}"]', inline_limit_bytes)
        for name, binding in message.inputs.items()
    }
    variables, secrets = environment_from_proto(message.environment, f"{field}.environment")
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
        network=network_from_proto(message.sandbox.network, isolation, f"{field}.sandbox.network"),
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
        variables=variables,
        secrets=secrets,
        services=services_from_proto(message.services, f"{field}.services"),
    )


def services_from_proto(names: Sequence[str], field: str) -> tuple[str, ...]:
    """Return the names of the services that a task needs, each once. Raises InvalidError."""
    for index, name in enumerate(names):
        if not name or len(name) > MAX_ID_LENGTH or not name.isprintable():
            raise invalid_field(f"{field}[{index}]", "must be the name of a service")
    if len(names) > MAX_SERVICES:
        raise invalid_field(field, f"names over {MAX_SERVICES} services")
    return tuple(sorted(set(names)))


def batch_from_proto(message: task_pb2.TaskSpec, field: str, rules: Sequence[BatchRule]) -> BatchPolicy:
    """Return how a task is batched, by the server's rules or its own policy. Raises InvalidError."""
    batch = message.batch
    if not 1 <= batch.max_size <= MAX_BATCH:
        raise invalid_field(f"{field}.batch.max_size", f"must be from 1 to {MAX_BATCH}")
    scope = BATCH_SCOPE_FROM_PROTO.get(batch.scope)
    if scope is None:
        raise invalid_field(f"{field}.batch.scope", f"there is no scope {batch.scope}")
    wait_s = delay_from_proto(batch.max_wait, f"{field}.batch.max_wait")
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


def task_to_spec(spec: TaskSpec) -> task_pb2.TaskSpec:
    """Return the definition of a task with its defaults filled in, its function named by digest."""
    message = task_pb2.TaskSpec(
        task_id=spec.task_id,
        display_name=spec.display_name,
        function=spec.function.digest,
        outputs=spec.outputs,
        after=spec.after,
        resources=resources_to_proto(spec.resources),
        retry=_retry_to_proto(spec.retry),
        isolation=ISOLATION_TO_PROTO[spec.isolation],
        node_selector=dict(spec.node_selector),
        priority=spec.priority,
        max_parallel=spec.max_parallel or None,
        concurrency_key=spec.concurrency_key,
        over=spec.over,
        batch=None if spec.batch is None else _batch_to_proto(spec.batch),
        condition=None if spec.condition is None else _condition_to_proto(spec.condition),
        services=spec.services,
    )
    if spec.network:
        message.sandbox.network.extend(spec.network)
    fill_environment(message.environment, spec.variables, spec.secrets)
    for name, binding in spec.inputs.items():
        fill_binding(message.inputs[name], binding)
    if spec.attempt_timeout_s is not None:
        message.timeout.attempt.CopyFrom(duration(spec.attempt_timeout_s))
    if spec.total_timeout_s is not None:
        message.timeout.total.CopyFrom(duration(spec.total_timeout_s))
    return message


def _retry_to_proto(policy: RetryPolicy) -> task_pb2.RetryPolicy:
    return task_pb2.RetryPolicy(
        max_attempts=policy.max_attempts,
        initial_backoff=duration(policy.initial_backoff_s),
        backoff_multiplier=policy.backoff_multiplier,
        max_backoff=duration(policy.max_backoff_s),
        retry_on=sorted(FAILURE_KIND_TO_PROTO[kind] for kind in policy.retry_on),
        retry_on_types=sorted(policy.retry_on_types),
        max_worker_losses=policy.max_worker_losses,
    )


def _batch_to_proto(policy: BatchPolicy) -> task_pb2.BatchPolicy:
    return task_pb2.BatchPolicy(
        max_size=policy.max_size,
        max_wait=duration(policy.max_wait_s),
        scope=BATCH_SCOPE_TO_PROTO[policy.scope],
    )


def _condition_to_proto(condition: Condition) -> task_pb2.Condition:
    equals = None if condition.equals is None else payload_to_proto(condition.equals)
    output = output_to_proto(condition.output)
    return task_pb2.Condition(output=output, equals=equals, negated=condition.is_negated)


def explanation_to_proto(explanation: Explanation, task: run_pb2.TaskRun) -> task_pb2.ExplainTaskResponse:
    """Return the message that explains why a task waits."""
    response = task_pb2.ExplainTaskResponse(task=task, waited=duration(explanation.waited_s))
    if explanation.start_in_s is not None:
        response.start_in.CopyFrom(duration(explanation.start_in_s))
    for reason in explanation.reasons:
        response.reasons.add(
            kind=REASON_KIND_TO_PROTO[reason.kind],
            message=reason.message,
            task_id=reason.task_id,
            node_id=reason.node_id,
            resource=RESOURCE_KIND_TO_PROTO.get(reason.resource, resources_pb2.RESOURCE_KIND_UNSPECIFIED),
            wanted=reason.wanted,
            free=reason.free,
        )
    return response
