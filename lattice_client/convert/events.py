"""Owns the translation of the events of a run to plain values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lattice.v1 import run_pb2

from lattice_client.convert.failures import failure_of
from lattice_client.convert.results import Declared, Decode, decode_all, ordered
from lattice_client.errors import InvalidArgumentError

RUN_STATES = [state.removeprefix("RUN_STATE_").lower() for state in run_pb2.RunState.keys()[1:]]


@dataclass(frozen=True, slots=True)
class RunEvent:
    """One event of a run.

    Attributes:
        sequence: the number of the event within its run, from 1.
        time_s: the time of the event, in seconds since 1970.
        type: the event's name in the contract, such as `task_started`.
        task_id: the task; empty for an event of the run itself.
        data: the event's fields, with outputs decoded.
    """

    sequence: int
    time_s: float
    type: str
    task_id: str
    data: Mapping[str, Any]


def run_state(name: str) -> run_pb2.RunState.ValueType:
    """Return the state of a run with a name such as `running`. Raises InvalidArgumentError."""
    if name not in RUN_STATES:
        raise InvalidArgumentError(f"a run has no state {name!r}; its states: {', '.join(RUN_STATES)}")
    return run_pb2.RunState.Value(f"RUN_STATE_{name.upper()}")


async def event_of(message: run_pb2.RunEvent, decode: Decode, declared: Declared) -> RunEvent:
    """Return an event whose outputs were read by `decode`."""
    kind = message.WhichOneof("event") or ""
    body = getattr(message, kind)
    data: dict[str, Any] = {}
    for field in body.DESCRIPTOR.fields:
        value = getattr(body, field.name)
        match field.name:
            case "outputs":
                found = ordered(value, declared.get(body.task_id.partition("[")[0], ()))
                data["outputs"] = await decode_all(body.task_id, found, decode)
            case "value":
                data["value"] = await decode(value, f"signal {body.name!r}")
            case "failure":
                data["failure"] = failure_of(value) if body.HasField("failure") else None
            case "gpu_indices" | "task_ids" | "unread_signals":
                data[field.name] = list(value)
            case "state":
                data["state"] = run_pb2.RunState.Name(value).removeprefix("RUN_STATE_").lower()
            case "stream":
                data["stream"] = "stderr" if value == run_pb2.LOG_STREAM_STDERR else "stdout"
            case "duration" | "queue_time":
                data[f"{field.name}_s"] = value.ToNanoseconds() / 1e9 if body.HasField(field.name) else None
            case "access":
                data |= _access_of(value)
            case "retry_time":
                data["retry_time_s"] = value.ToNanoseconds() / 1e9
            case _:
                data[field.name] = value
    return RunEvent(message.sequence, message.time.ToNanoseconds() / 1e9, kind, data.get("task_id", ""), data)


def _access_of(access: run_pb2.NetworkAccess) -> dict[str, Any]:
    """Return the fields of a fact about connections, its verdict as a word such as `not_listed`."""
    verdict = run_pb2.NetworkVerdict.Name(access.verdict).removeprefix("NETWORK_VERDICT_").lower()
    plain = {field.name: getattr(access, field.name) for field in access.DESCRIPTOR.fields}
    return {**plain, "verdict": verdict}


def message_of(event: RunEvent, workflow_id: str, run_id: str) -> dict[str, Any] | None:
    """Return an event as a message of `get_results`; None for an event that has no such message."""
    data: dict[str, Any] = {"workflow_id": workflow_id, "task_id": event.task_id}
    match event.type:
        case "task_started":
            gpus = event.data["gpu_indices"]
            data |= {"node_ip": event.data["node_ip"], "node_id": event.data["node_id"]}
            return {"type": "start_task", "data": data | {"gpu_id": gpus[0] if gpus else None}}
        case "task_succeeded":
            return {"type": "finish_task", "data": data | {"result": event.data["outputs"]}}
        case "task_failed":
            return {"type": "task_exception", "data": data | {"result": event.data["failure"]["message"]}}
        case "run_finished":
            return {"type": "finish_workflow", "data": {"run_id": str(run_id)}}
        case _:
            return None
