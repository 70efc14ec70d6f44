"""Owns the translation between a graph and the contract, and between events and plain values."""

from collections.abc import Awaitable, Callable, Collection, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lattice.v1 import errors_pb2, payload_pb2, run_pb2, task_pb2, workflow_pb2

from lattice_client import payloads
from lattice_client.errors import RunCancelledError, RunError, RunTimeoutError, TaskDefinitionError, TaskFailedError
from lattice_client.workflow import UNSET, LatticeTask, TaskOutput

Upload = Callable[[bytes], Awaitable[payload_pb2.Artifact]]
Decode = Callable[[payload_pb2.Payload], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class RunEvent:
    """One event of a run. `type` is the event's name in the contract, such as `task_started`; `data` its fields, with
    outputs decoded; `task_id` is empty for events of the run itself."""

    sequence: int
    time_s: float
    type: str
    task_id: str
    data: Mapping[str, Any]


FAILURE_POLICIES = {
    "fail_fast": workflow_pb2.FAILURE_POLICY_FAIL_FAST,
    "finish_independent": workflow_pb2.FAILURE_POLICY_FINISH_INDEPENDENT,
}


async def tasks_of(tasks: Collection[LatticeTask], upload: Upload) -> workflow_pb2.WorkflowSpec:
    """Return tasks as one message, without their code; see `fill_code`. Large inputs are uploaded."""
    spec, names = workflow_pb2.WorkflowSpec(), _names(tasks)
    for task in tasks:
        await _fill_task(spec.tasks.add(), task, names[id(task.definition)], upload)
    return spec


def fill_code(spec: workflow_pb2.WorkflowSpec, tasks: Collection[LatticeTask], known: Container[str]) -> None:
    """Put the code of `tasks` into their message, in place of what was there; what is `known` goes by its digest."""
    spec.ClearField("functions")
    spec.ClearField("bundles")
    bundles: set[str] = set()
    names = _names(tasks)
    for definition in {id(task.definition): task.definition for task in tasks}.values():
        function, bundle = definition.code
        name = names[id(definition)]
        if function.digest in known:
            spec.functions[name].digest = function.digest
        else:
            spec.functions[name].CopyFrom(function)
            if bundle is not None and bundle.digest not in bundles:
                bundles.add(bundle.digest)
                spec.bundles.append(bundle)


def _names(tasks: Iterable[LatticeTask]) -> dict[int, str]:
    """Return what the definitions of tasks are called in their message, by the definitions' identity."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    for task in tasks:
        if id(task.definition) not in names:
            name = task.definition.name if task.definition.name not in taken else task.task_id
            names[id(task.definition)] = name
            taken.add(name)
    return names


async def task_of(task: LatticeTask, function: str, upload: Upload) -> task_pb2.TaskSpec:
    """Return one task as a message."""
    message = task_pb2.TaskSpec()
    await _fill_task(message, task, function, upload)
    return message


async def _fill_task(message: task_pb2.TaskSpec, task: LatticeTask, function: str, upload: Upload) -> None:
    message.CopyFrom(task.definition.form)
    message.task_id = task.task_id
    message.display_name = task.display_name
    message.function = function
    message.after.extend(task.after)
    message.over = task.over
    if task.condition is not None:
        _fill_reference(message.condition.output, task.condition.output)
        message.condition.negated = task.condition.is_negated
        if task.condition.equals is not UNSET:
            where = f"what the condition of task {task.task_id!r} is compared with"
            message.condition.equals.CopyFrom(await payload_of(task.condition.equals, where, upload))
            if message.condition.equals.WhichOneof("content") != "json":
                raise TaskDefinitionError(f"{where} must be JSON")
    for name, value in task.inputs.items():
        await _fill_binding(message.inputs[name], value, f"input {name!r} of task {task.task_id!r}", upload)


def _has_output(value: Any) -> bool:
    if isinstance(value, TaskOutput):
        return True
    if isinstance(value, list | tuple):
        return any(map(_has_output, value))
    return isinstance(value, dict) and any(map(_has_output, value.values()))


async def _fill_binding(message: payload_pb2.Binding, value: Any, where: str, upload: Upload) -> None:
    if isinstance(value, LatticeTask):
        raise TaskDefinitionError(f'{where} is a task; wire one of its outputs: task.outputs["name"]')
    if isinstance(value, TaskOutput):
        _fill_reference(message.output, value)
    elif not _has_output(value):
        message.payload.CopyFrom(await payload_of(value, where, upload))
    elif isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TaskDefinitionError(f"{where} wires an output inside a dict whose keys are not all strings")
        for key, item in value.items():
            await _fill_binding(message.map.entries[key], item, where, upload)
    else:
        for item in value:
            await _fill_binding(message.list.items.add(), item, where, upload)


def _fill_reference(message: payload_pb2.OutputRef, output: TaskOutput) -> None:
    message.task_id, message.output, message.optional = output.task_id, output.output, output.is_optional


async def payload_of(value: Any, where: str, upload: Upload) -> payload_pb2.Payload:
    """Return a value as a payload, uploaded when it is large. Raises TaskDefinitionError."""
    try:
        media_type, data = payloads.encode(value)
    except Exception as error:
        raise TaskDefinitionError(f"{where} cannot be pickled: {error}") from error
    if len(data) <= payloads.INLINE_LIMIT_BYTES:
        return payloads.inline(media_type, data)
    return payload_pb2.Payload(media_type=media_type, artifact=await upload(data))


async def event_of(message: run_pb2.RunEvent, decode: Decode) -> RunEvent:
    """Return an event with its outputs decoded."""
    kind = message.WhichOneof("event") or ""
    body = getattr(message, kind)
    data: dict[str, Any] = {}
    for field in body.DESCRIPTOR.fields:
        value = getattr(body, field.name)
        match field.name:
            case "outputs":
                data["outputs"] = {name: await decode(payload) for name, payload in value.items()}
            case "failure":
                data["failure"] = failure_of(value) if body.HasField("failure") else None
            case "gpu_indices" | "task_ids":
                data[field.name] = list(value)
            case "state":
                data["state"] = run_pb2.RunState.Name(value).removeprefix("RUN_STATE_").lower()
            case "stream":
                data["stream"] = "stderr" if value == run_pb2.LOG_STREAM_STDERR else "stdout"
            case "retry_time":
                data["retry_time_s"] = value.ToNanoseconds() / 1e9
            case _:
                data[field.name] = value
    return RunEvent(message.sequence, message.time.ToNanoseconds() / 1e9, kind, data.get("task_id", ""), data)


def message_of(event: RunEvent, workflow_id: str, run_id: str) -> dict[str, Any] | None:
    """Return an event as one of the messages of `get_results`; None for events it leaves out."""
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


async def outputs_of(tasks: Iterable[run_pb2.TaskRun], decode: Decode) -> dict[str, dict[str, Any]]:
    """Return the outputs of final tasks by task and name; those of a mapped task are lists of its items'."""
    found: dict[str, dict[str, Any]] = {}
    mapped: set[str] = set()
    for task in tasks:
        if task.state == run_pb2.TASK_STATE_SKIPPED:
            continue
        values = {name: await decode(payload) for name, payload in task.outputs.items()}
        if task.HasField("item_count"):
            mapped.add(task.task_id)
            found[task.task_id] = values  # empty lists when it has no items, or else nothing
        elif task.parent_task_id in mapped:
            for name, value in values.items():
                found[task.parent_task_id].setdefault(name, []).append(value)
        else:
            found[task.task_id] = values
    return found


def failure_of(failure: errors_pb2.Failure) -> dict[str, str]:
    """Return what people want to know of a failure."""
    kind = errors_pb2.FailureKind.Name(failure.kind).removeprefix("FAILURE_KIND_")
    return {
        "kind": kind,
        "type": failure.type,
        "message": failure.message,
        "traceback": failure.traceback,
        "task_id": failure.task_id,
    }


def error_of(run: run_pb2.Run) -> RunError | None:
    """Return the error of a run that ended otherwise than well; `opened` gives it the original exception as cause."""
    if run.state == run_pb2.RUN_STATE_SUCCEEDED:
        return None
    failure = run.failure
    if failure.kind == errors_pb2.FAILURE_KIND_TIMEOUT and not failure.task_id:
        return RunTimeoutError(run.run_id, f"run {run.run_id!r} failed: {failure.message}")
    if run.state == run_pb2.RUN_STATE_CANCELLED:
        return RunCancelledError(run.run_id, f"run {run.run_id!r} was cancelled: {failure.message}")
    shown = failure_of(failure)
    message = f"{failure.type}: {failure.message}" if failure.type else failure.message
    failed = run.task_counts.failed
    error = TaskFailedError(run.run_id, failure.task_id, shown["kind"], message, failure.traceback, failed)
    if failure.HasField("exception"):
        error.exception = failure.exception
    elif failure.type:
        why = "it could not be pickled there, or is not Python's"
        error.missing_cause = f"The worker sent the original exception as text only: {why}"
    return error
