"""Owns the translation between protobuf and the core, as pairs of functions. Rule: it checks form, no more."""

import hashlib
from collections.abc import Callable, Iterable, Mapping

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from lattice.v1 import errors_pb2, payload_pb2, resources_pb2, task_pb2

from lattice_server.core.errors import ExhaustedError, invalid_field
from lattice_server.core.model import (
    Artifact,
    Binding,
    BindingList,
    BindingMap,
    Capacity,
    Failure,
    FailureKind,
    Function,
    Gpu,
    Isolation,
    OutputRef,
    Parameter,
    Payload,
    Resources,
    RetryPolicy,
    TaskSpec,
)

MAX_ID_LENGTH = 128
JSON = "application/json"

ISOLATION_FROM_PROTO = {
    resources_pb2.ISOLATION_UNSPECIFIED: Isolation.NONE,
    resources_pb2.ISOLATION_NONE: Isolation.NONE,
    resources_pb2.ISOLATION_SUBPROCESS: Isolation.SUBPROCESS,
    resources_pb2.ISOLATION_SECCOMP: Isolation.SECCOMP,
    resources_pb2.ISOLATION_DOCKER: Isolation.DOCKER,
}
ISOLATION_TO_PROTO = {
    core: proto for proto, core in ISOLATION_FROM_PROTO.items() if proto != resources_pb2.ISOLATION_UNSPECIFIED
}
FAILURE_KIND_TO_PROTO = {
    FailureKind.USER_ERROR: errors_pb2.FAILURE_KIND_USER_ERROR,
    FailureKind.CRASHED: errors_pb2.FAILURE_KIND_CRASHED,
    FailureKind.OUT_OF_MEMORY: errors_pb2.FAILURE_KIND_OUT_OF_MEMORY,
    FailureKind.TIMEOUT: errors_pb2.FAILURE_KIND_TIMEOUT,
    FailureKind.CANCELLED: errors_pb2.FAILURE_KIND_CANCELLED,
    FailureKind.WORKER_LOST: errors_pb2.FAILURE_KIND_WORKER_LOST,
    FailureKind.PAYLOAD: errors_pb2.FAILURE_KIND_PAYLOAD,
    FailureKind.RESOURCES: errors_pb2.FAILURE_KIND_RESOURCES,
    FailureKind.UPSTREAM: errors_pb2.FAILURE_KIND_UPSTREAM,
    FailureKind.INTERNAL: errors_pb2.FAILURE_KIND_INTERNAL,
}
FAILURE_KIND_FROM_PROTO = {proto: core for core, proto in FAILURE_KIND_TO_PROTO.items()}


def timestamp(seconds: float | None) -> Timestamp | None:
    """Return the timestamp `seconds` after the epoch; None stays None."""
    if seconds is None:
        return None
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp


def duration(seconds: float) -> Duration:
    """Return a duration."""
    return Duration(seconds=int(seconds), nanos=int((seconds % 1) * 1e9))


def seconds_from(message: Duration) -> float:
    """Return a duration in seconds."""
    return float(message.seconds) + message.nanos / 1e9


def payload_from_proto(message: payload_pb2.Payload, field: str, inline_limit_bytes: int) -> Payload:
    """Check and return a payload. Raises InvalidError, or ExhaustedError when it is too large to inline."""
    match message.WhichOneof("content"):
        case "json":
            content: str | bytes | Artifact = message.json
            size = len(message.json)
        case "data":
            if not message.media_type:
                raise invalid_field(f"{field}.media_type", "bytes need a media type")
            content, size = message.data, len(message.data)
        case "artifact":
            artifact = message.artifact
            content, size = Artifact(artifact.artifact_id, artifact.size_bytes, artifact.node_id), 0
        case _:
            raise invalid_field(field, "a payload needs json, data or artifact")
    if size > inline_limit_bytes:
        text = f"{field}: {size} bytes inline, the limit is {inline_limit_bytes}; store it with WriteArtifact"
        raise ExhaustedError("PAYLOAD_TOO_LARGE", text, metadata={"field": field})
    return Payload(message.media_type or JSON, content)


def payload_to_proto(payload: Payload) -> payload_pb2.Payload:
    """Return the message of a payload."""
    content = payload.content
    if isinstance(content, str):
        return payload_pb2.Payload(media_type=payload.media_type, json=content)
    if isinstance(content, bytes):
        return payload_pb2.Payload(media_type=payload.media_type, data=content)
    return payload_pb2.Payload(media_type=payload.media_type, artifact=artifact_to_proto(content))


def artifact_to_proto(artifact: Artifact) -> payload_pb2.Artifact:
    """Return the message of a reference."""
    return payload_pb2.Artifact(
        artifact_id=artifact.artifact_id, size_bytes=artifact.size_bytes, node_id=artifact.node_id
    )


def payloads_to_proto(payloads: Mapping[str, Payload]) -> dict[str, payload_pb2.Payload]:
    """Return the messages of named payloads."""
    return {name: payload_to_proto(payload) for name, payload in payloads.items()}


def binding_from_proto(message: payload_pb2.Binding, field: str, inline_limit_bytes: int) -> Binding:
    """Check and return a binding, nested ones included."""
    match message.WhichOneof("source"):
        case "payload":
            return payload_from_proto(message.payload, field, inline_limit_bytes)
        case "output":
            return OutputRef(message.output.task_id, message.output.output)
        case "parameter":
            return Parameter(message.parameter)
        case "list":
            items = enumerate(message.list.items)
            return BindingList(tuple(binding_from_proto(m, f"{field}[{i}]", inline_limit_bytes) for i, m in items))
        case "map":
            entries = message.map.entries.items()
            return BindingMap({k: binding_from_proto(m, f'{field}["{k}"]', inline_limit_bytes) for k, m in entries})
        case _:
            raise invalid_field(field, "a binding needs a source: payload, output, parameter, list or map")


def binding_to_proto(binding: Binding) -> payload_pb2.Binding:
    """Return the message of a binding."""
    match binding:
        case Payload():
            return payload_pb2.Binding(payload=payload_to_proto(binding))
        case OutputRef(task_id, output):
            return payload_pb2.Binding(output=payload_pb2.OutputRef(task_id=task_id, output=output))
        case Parameter(name):
            return payload_pb2.Binding(parameter=name)
        case BindingList(items):
            return payload_pb2.Binding(list=payload_pb2.BindingList(items=[binding_to_proto(i) for i in items]))
        case BindingMap(entries):
            nested = {key: binding_to_proto(item) for key, item in entries.items()}
            return payload_pb2.Binding(map=payload_pb2.BindingMap(entries=nested))


def resources_from_proto(message: resources_pb2.Resources, field: str, *, is_async: bool) -> Resources:
    """Return resources with defaults filled in. Raises InvalidError."""
    cpu = message.cpu if message.HasField("cpu") else (0.0 if is_async else 1.0)
    resources = Resources(cpu, message.memory_bytes, message.gpu, message.gpu_memory_bytes)
    if not (0 <= resources.cpu < 1e6 and 0 <= resources.gpu < 1e6):
        raise invalid_field(field, "cpu and gpu must be numbers from 0")
    if resources.memory_bytes < 0 or resources.gpu_memory_bytes < 0:
        raise invalid_field(field, "memory must not be negative")
    if resources.gpu > 1 and resources.gpu != int(resources.gpu):
        raise invalid_field(f"{field}.gpu", "more than one GPU must be a whole number")
    return resources


def resources_to_proto(resources: Resources) -> resources_pb2.Resources:
    """Return the message of resources."""
    return resources_pb2.Resources(
        cpu=resources.cpu,
        memory_bytes=resources.memory_bytes,
        gpu=resources.gpu,
        gpu_memory_bytes=resources.gpu_memory_bytes,
    )


def capacity_from_proto(message: resources_pb2.Capacity) -> Capacity:
    """Return what a worker offers."""
    gpus = tuple(Gpu(gpu.index, gpu.model, gpu.memory_bytes, gpu.uuid) for gpu in message.gpus)
    return Capacity(message.cpu, message.memory_bytes, gpus, message.slots, message.async_slots)


def capacity_to_proto(capacity: Capacity) -> resources_pb2.Capacity:
    """Return the message of a capacity."""
    gpus = [
        resources_pb2.Gpu(index=g.index, model=g.model, memory_bytes=g.memory_bytes, uuid=g.uuid) for g in capacity.gpus
    ]
    return resources_pb2.Capacity(
        cpu=capacity.cpu,
        memory_bytes=capacity.memory_bytes,
        gpus=gpus,
        slots=capacity.slots,
        async_slots=capacity.async_slots,
    )


def failure_from_proto(message: errors_pb2.Failure) -> Failure:
    """Return a failure a worker reported."""
    return Failure(
        FAILURE_KIND_FROM_PROTO.get(message.kind, FailureKind.INTERNAL),
        message.message,
        type=message.type,
        traceback=message.traceback,
        exception=Payload(message.exception.media_type, message.exception.data)
        if message.HasField("exception")
        else None,
        exit_status=message.exit_status if message.HasField("exit_status") else None,
    )


def failure_to_proto(failure: Failure | None) -> errors_pb2.Failure | None:
    """Return the message of a failure; None stays None."""
    if failure is None:
        return None
    return errors_pb2.Failure(
        kind=FAILURE_KIND_TO_PROTO[failure.kind],
        type=failure.type,
        message=failure.message,
        traceback=failure.traceback,
        exception=payload_to_proto(failure.exception) if failure.exception else None,
        task_id=failure.task_id,
        exit_status=failure.exit_status,
        cause=failure_to_proto(failure.cause),
    )


def function_from_proto(message: task_pb2.Function, bundle_of: Callable[[str], task_pb2.CodeBundle]) -> Function:
    """Return a function that came with its code, named by the digest of what came."""
    stripped = task_pb2.Function()
    stripped.CopyFrom(message)
    stripped.ClearField("digest")
    content = stripped.SerializeToString(deterministic=True)
    stripped.digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    bundle = bundle_of(message.bundle_digest) if message.bundle_digest else None
    is_async = message.concurrency == task_pb2.CONCURRENCY_ASYNC
    return Function(stripped.digest, is_async, (stripped, bundle), message.bundle_digest)


def code_to_proto(function: Function) -> tuple[task_pb2.Function, task_pb2.CodeBundle | None]:
    """Return a function's code and its bundle, as `function_from_proto` put them by."""
    definition = function.definition
    assert isinstance(definition, tuple)
    code, bundle = definition
    return code, bundle


def retry_from_proto(message: task_pb2.RetryPolicy) -> RetryPolicy:
    """Return a retry policy with defaults filled in."""
    default = RetryPolicy()
    return RetryPolicy(
        max_attempts=message.max_attempts or default.max_attempts,
        initial_backoff_s=seconds_from(message.initial_backoff) or default.initial_backoff_s,
        backoff_multiplier=message.backoff_multiplier or default.backoff_multiplier,
        max_backoff_s=seconds_from(message.max_backoff) or default.max_backoff_s,
        retry_on=frozenset(FAILURE_KIND_FROM_PROTO[k] for k in message.retry_on if k in FAILURE_KIND_FROM_PROTO)
        or default.retry_on,
        retry_on_types=frozenset(message.retry_on_types),
        max_worker_losses=message.max_worker_losses or default.max_worker_losses,
    )


DEFAULT_RETRY = RetryPolicy()


def task_from_proto(
    message: task_pb2.TaskSpec, field: str, functions: Mapping[str, Function], inline_limit_bytes: int
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
    if message.batch.max_size > 1:
        raise invalid_field(f"{field}.batch", "this server does not batch yet")
    if ISOLATION_FROM_PROTO[message.isolation] is not Isolation.NONE:
        raise invalid_field(f"{field}.isolation", "this server has no worker that isolates more than ISOLATION_NONE")
    if message.timeout.HasField("total"):
        raise invalid_field(f"{field}.timeout.total", "this server limits attempts only")
    if message.max_parallel:
        raise invalid_field(f"{field}.max_parallel", "this server has no such limit yet")
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
        retry=retry_from_proto(message.retry) if message.HasField("retry") else DEFAULT_RETRY,
        attempt_timeout_s=(seconds_from(message.timeout.attempt) or None) if message.HasField("timeout") else None,
        isolation=ISOLATION_FROM_PROTO[message.isolation],
        node_selector=tuple(sorted(message.node_selector.items())),
        priority=message.priority,
    )


def tasks_from_proto(
    messages: Iterable[task_pb2.TaskSpec], functions: Mapping[str, Function], inline_limit_bytes: int
) -> tuple[TaskSpec, ...]:
    """Check and return tasks, in order."""
    return tuple(task_from_proto(m, f"tasks[{i}]", functions, inline_limit_bytes) for i, m in enumerate(messages))
