"""Converts payloads, bindings and failures. Rule: the form of a message is checked here, its meaning in the core."""

import re
from collections.abc import Mapping
from dataclasses import replace

from lattice.v1 import errors_pb2, payload_pb2

from lattice_server.core.errors import ExhaustedError, invalid_field
from lattice_server.core.model import (
    Artifact,
    Binding,
    BindingList,
    BindingMap,
    Failure,
    FailureKind,
    Isolation,
    OutputRef,
    Parameter,
    Path,
    Payload,
    Selection,
)
from lattice_server.rpc.convert.resources import ISOLATION_FROM_PROTO, ISOLATION_TO_PROTO

JSON = "application/json"
MAX_PATH = 32
# A file name that every store accepts.
FILE_NAME = re.compile(r"(?!\.{1,2}$)[^/\x00-\x1f\x7f]{1,255}")

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
    FailureKind.POLICY: errors_pb2.FAILURE_KIND_POLICY,
    FailureKind.CPU_TIME: errors_pb2.FAILURE_KIND_CPU_TIME,
    FailureKind.OUTPUT_SIZE: errors_pb2.FAILURE_KIND_OUTPUT_SIZE,
    FailureKind.SANDBOX_SETUP: errors_pb2.FAILURE_KIND_SANDBOX_SETUP,
    FailureKind.UNTRUSTED_INPUT: errors_pb2.FAILURE_KIND_UNTRUSTED_INPUT,
    FailureKind.NESTED_RESOURCES: errors_pb2.FAILURE_KIND_NESTED_RESOURCES,
}
FAILURE_KIND_FROM_PROTO = {proto: core for core, proto in FAILURE_KIND_TO_PROTO.items()}


def payload_from_proto(message: payload_pb2.Payload, field: str, inline_limit_bytes: int) -> Payload:
    """Check and return a payload. Raises InvalidError, or ExhaustedError when it is too large to inline."""
    match message.WhichOneof("content"):
        case "json":
            content: str | bytes | Artifact = message.json
            size = len(message.json) if message.json.isascii() else len(message.json.encode())
        case "data":
            if not message.media_type:
                raise invalid_field(f"{field}.media_type", "bytes need a media type")
            content, size = message.data, len(message.data)
        case "artifact":
            content, size = artifact_from_proto(message.artifact, f"{field}.artifact"), 0
        case _:
            raise invalid_field(field, "a payload needs json, data or artifact")
    if size > inline_limit_bytes:
        text = f"{field}: {size} bytes inline, the limit is {inline_limit_bytes}; store it with WriteArtifact"
        raise ExhaustedError("PAYLOAD_TOO_LARGE", text, metadata={"field": field})
    if not message.produced_at:
        return Payload(message.media_type or JSON, content)
    level = ISOLATION_FROM_PROTO.get(message.produced_at)
    if level is None:
        raise invalid_field(f"{field}.produced_at", "this server does not know this isolation level")
    return Payload(message.media_type or JSON, content, level)


def question_from_proto(message: payload_pb2.Payload, limit_bytes: int, field: str = "payload") -> Payload:
    """Return the content of a question, its answer, or a signal. Raises InvalidError unless it is small and inline."""
    size = message.ByteSize()
    if size > limit_bytes or message.HasField("artifact"):
        found = "an artifact" if message.HasField("artifact") else f"{size} bytes"
        limit = f"a question, its answer and a signal travel inline and may have {limit_bytes} bytes"
        remedy = "pass a larger value as an input of the task, or return it as an output"
        raise invalid_field(field, f"it is {found}, and {limit}; {remedy}")
    return payload_from_proto(message, field, limit_bytes)


def artifact_from_proto(message: payload_pb2.Artifact, field: str) -> Artifact:
    """Check and return a reference to a large value. Raises InvalidError."""
    if not FILE_NAME.fullmatch(message.artifact_id):
        raise invalid_field(f"{field}.artifact_id", "must be the name of a file: up to 255 characters, no slash")
    if message.size_bytes < 0:
        raise invalid_field(f"{field}.size_bytes", "must not be negative")
    return Artifact(message.artifact_id, message.size_bytes, message.node_id)


def payload_to_proto(payload: Payload) -> payload_pb2.Payload:
    """Return the message of a payload."""
    message = payload_pb2.Payload()
    fill_payload(message, payload)
    return message


def fill_payload(message: payload_pb2.Payload, payload: Payload) -> None:
    """Write a payload into an empty message."""
    message.media_type = payload.media_type
    if payload.produced_at is not Isolation.NONE:
        message.produced_at = ISOLATION_TO_PROTO[payload.produced_at]
    content = payload.content
    if isinstance(content, str):
        message.json = content
    elif isinstance(content, bytes):
        message.data = content
    else:
        message.artifact.CopyFrom(artifact_to_proto(content))


def artifact_to_proto(artifact: Artifact) -> payload_pb2.Artifact:
    """Return the message of a reference."""
    return payload_pb2.Artifact(
        artifact_id=artifact.artifact_id, size_bytes=artifact.size_bytes, node_id=artifact.node_id
    )


def payloads_to_proto(payloads: Mapping[str, Payload]) -> dict[str, payload_pb2.Payload]:
    """Return the messages of named payloads."""
    return {name: payload_to_proto(payload) for name, payload in payloads.items()}


def output_from_proto(message: payload_pb2.OutputRef, field: str) -> OutputRef:
    """Check and return a reference to an output. Raises InvalidError."""
    if len(message.path) > MAX_PATH:
        raise invalid_field(f"{field}.path", f"must have at most {MAX_PATH} steps")
    path: list[str | int] = []
    for number, step in enumerate(message.path):
        kind = step.WhichOneof("step")
        if kind is None:
            raise invalid_field(f"{field}.path[{number}]", "a step needs a key or an index")
        path.append(step.key if kind == "key" else step.index)
    return OutputRef(message.task_id, message.output, message.optional, tuple(path))


def output_to_proto(output: OutputRef) -> payload_pb2.OutputRef:
    """Return the message of a reference to an output."""
    return payload_pb2.OutputRef(
        task_id=output.task_id, output=output.output, optional=output.is_optional, path=_path_to_proto(output.path)
    )


def _path_to_proto(path: Path) -> list[payload_pb2.PathStep]:
    return [
        payload_pb2.PathStep(key=step) if isinstance(step, str) else payload_pb2.PathStep(index=step) for step in path
    ]


def binding_from_proto(message: payload_pb2.Binding, field: str, inline_limit_bytes: int) -> Binding:
    """Check and return a binding, nested ones included."""
    match message.WhichOneof("source"):
        case "payload":
            return payload_from_proto(message.payload, field, inline_limit_bytes)
        case "output":
            return output_from_proto(message.output, field)
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


def fill_binding(message: payload_pb2.Binding, binding: Binding) -> None:
    """Write a binding into an empty message."""
    match binding:
        case Payload():
            fill_payload(message.payload, binding)
        case OutputRef():
            message.output.CopyFrom(output_to_proto(binding))
        case Parameter(name):
            message.parameter = name
        case BindingList(items):
            message.list.SetInParent()
            for item in items:
                fill_binding(message.list.items.add(), item)
        case BindingMap(entries):
            message.map.SetInParent()
            for key, item in entries.items():
                fill_binding(message.map.entries[key], item)
        case Selection(value, path):
            fill_binding(message.selection.value, value)
            message.selection.path.extend(_path_to_proto(path))


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
        base_types=tuple(message.base_types),
    )


def failure_to_proto(failure: Failure | None, *, is_brief: bool = False) -> errors_pb2.Failure | None:
    """Return the message of a failure, a brief one without traceback, exception and cause; None stays None."""
    if failure is None:
        return None
    if is_brief:
        failure = replace(failure, traceback="", exception=None, cause=None)
    return errors_pb2.Failure(
        kind=FAILURE_KIND_TO_PROTO[failure.kind],
        type=failure.type,
        message=failure.message,
        traceback=failure.traceback,
        exception=payload_to_proto(failure.exception) if failure.exception else None,
        task_id=failure.task_id,
        exit_status=failure.exit_status,
        cause=failure_to_proto(failure.cause),
        base_types=failure.base_types,
    )
