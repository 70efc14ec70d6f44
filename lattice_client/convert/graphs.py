"""Owns the translation between a graph and the contract, and between events and plain values."""

from collections.abc import Awaitable, Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, count
from typing import Any, TypeVar

from lattice.v1 import errors_pb2, payload_pb2, run_pb2, task_pb2, workflow_pb2

from lattice_client.code.freshness import file_at
from lattice_client.errors import (
    InvalidArgumentError,
    RunCancelledError,
    RunError,
    RunTimeoutError,
    TaskDefinitionError,
    TaskFailedError,
)
from lattice_client.graph.inputs import Binder, Store
from lattice_client.graph.outputs import UNSET, Scope, TaskOutput
from lattice_client.graph.workflow import LatticeTask

T = TypeVar("T")
Decode = Callable[[payload_pb2.Payload], Awaitable[Any]]
# The names of the outputs of a run's tasks in their order, by task id, as far as that is known here.
Declared = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class RunEvent:
    """One event of a run. `type` is the event's name in the contract, such as `task_started`; `data` its fields, with
    outputs decoded; `task_id` is empty for events of the run itself."""

    sequence: int
    time_s: float
    type: str
    task_id: str
    data: Mapping[str, Any]


RUN_STATES = [state.removeprefix("RUN_STATE_").lower() for state in run_pb2.RunState.keys()[1:]]
FAILURE_POLICIES = {
    "fail_fast": workflow_pb2.FAILURE_POLICY_FAIL_FAST,
    "finish_independent": workflow_pb2.FAILURE_POLICY_FINISH_INDEPENDENT,
}


async def tasks_of(tasks: Collection[LatticeTask], store: Store, scope: Scope) -> workflow_pb2.WorkflowSpec:
    """Return tasks as one message, without their code; see `fill_code`. Large inputs are uploaded.

    Raises TaskDefinitionError when a task is wired to an output that does not belong to the run.
    """
    spec, names = workflow_pb2.WorkflowSpec(), _names(tasks)
    for task in tasks:
        await _fill_task(spec.tasks.add(), task, names[id(task.definition)], store, scope)
    return spec


def pack_code(tasks: Iterable[LatticeTask]) -> None:
    """Pickle what changed of the code of tasks, in the caller's thread. Raises TaskDefinitionError.

    A file is looked at once, however many functions it travels with.
    """
    look = cache(file_at)
    for definition in {id(task.definition): task.definition for task in tasks}.values():
        definition.pack(look)


def fill_code(spec: workflow_pb2.WorkflowSpec, tasks: Collection[LatticeTask], known: Container[str]) -> None:
    """Put the code of `tasks` into their message, in place of what was there; what is `known` goes by its digest."""
    spec.ClearField("functions")
    spec.ClearField("bundles")
    bundles: set[str] = set()
    names = _names(tasks)
    for definition in {id(task.definition): task.definition for task in tasks}.values():
        function, bundle = definition.packed
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
    for definition in {id(task.definition): task.definition for task in tasks}.values():
        spellings = chain([definition.name], (f"{definition.name}-{number}" for number in count(2)))
        names[id(definition)] = name = next(name for name in spellings if name not in taken)
        taken.add(name)
    return names


async def task_of(task: LatticeTask, function: str, store: Store) -> task_pb2.TaskSpec:
    """Return a task that runs alone as a message. Raises TaskDefinitionError."""
    message = task_pb2.TaskSpec()
    await _fill_task(message, task, function, store, Scope(lambda output: False, ()))
    return message


async def _fill_task(message: task_pb2.TaskSpec, task: LatticeTask, function: str, store: Store, scope: Scope) -> None:
    message.CopyFrom(task.definition.form)
    message.task_id = task.task_id
    message.display_name = task.display_name
    message.function = function
    message.after.extend(task.after)
    message.over = task.over
    if task.condition is not None:
        binder = Binder(f"the condition of task {task.task_id!r}", store, scope)
        binder.fill_reference(message.condition.output, task.condition.output)
        message.condition.negated = task.condition.is_negated
        if task.condition.equals is not UNSET:
            where = f"what the condition of task {task.task_id!r} is compared with"
            binder = Binder(where, store, scope)
            message.condition.equals.CopyFrom(await binder.payload_of(task.condition.equals))
            if message.condition.equals.WhichOneof("content") != "json":
                raise TaskDefinitionError(f"{where} must be JSON")
    entrypoint = task.definition.entrypoint
    for name, value in task.inputs.items():
        where = f"input {name!r} of task {task.task_id!r}"
        binder = Binder(where, store, scope, is_for_python=not entrypoint or ":" in entrypoint)
        await binder.fill(message.inputs[name], value)


def run_state(name: str) -> run_pb2.RunState.ValueType:
    """Return the state of a run by its name, such as `running`. Raises InvalidArgumentError."""
    if name not in RUN_STATES:
        raise InvalidArgumentError(f"a run has no state {name!r}; its states: {', '.join(RUN_STATES)}")
    return run_pb2.RunState.Value(f"RUN_STATE_{name.upper()}")


def ordered(outputs: Mapping[str, T], declared: Sequence[str] = ()) -> dict[str, T]:
    """Return outputs in the order they were declared in, and any others by name: a map of the contract has no order."""
    first = [name for name in declared if name in outputs]
    return {name: outputs[name] for name in [*first, *sorted(set(outputs).difference(first))]}


async def event_of(message: run_pb2.RunEvent, decode: Decode, declared: Declared) -> RunEvent:
    """Return an event with its outputs decoded."""
    kind = message.WhichOneof("event") or ""
    body = getattr(message, kind)
    data: dict[str, Any] = {}
    for field in body.DESCRIPTOR.fields:
        value = getattr(body, field.name)
        match field.name:
            case "outputs":
                found = ordered(value, declared.get(body.task_id.partition("[")[0], ()))
                data["outputs"] = {name: await decode(payload) for name, payload in found.items()}
            case "failure":
                data["failure"] = failure_of(value) if body.HasField("failure") else None
            case "gpu_indices" | "task_ids":
                data[field.name] = list(value)
            case "state":
                data["state"] = run_pb2.RunState.Name(value).removeprefix("RUN_STATE_").lower()
            case "stream":
                data["stream"] = "stderr" if value == run_pb2.LOG_STREAM_STDERR else "stdout"
            case "duration" | "queue_time":
                data[f"{field.name}_s"] = value.ToNanoseconds() / 1e9 if body.HasField(field.name) else None
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


async def result_of(tasks: Iterable[run_pb2.TaskRun], decode: Decode, declared: Declared) -> dict[str, Any]:
    """Return the outputs of the final tasks of a run that ended: of a single one by name, of several by task id.

    Whether there are several is a matter of the graph: one that did not succeed counts. Among several it is None.
    """
    final: dict[str, run_pb2.TaskRun] = {}
    items: dict[str, list[run_pb2.TaskRun]] = {}
    for task in tasks:
        if task.parent_task_id in items:
            items[task.parent_task_id].append(task)
            continue
        final[task.task_id] = task
        if task.HasField("item_count"):
            items[task.task_id] = []
    found = {
        name: await outputs_of(one, items.get(name, ()), decode, declared.get(name, ())) for name, one in final.items()
    }
    if len(found) == 1:
        (outputs,) = found.values()
        return outputs or {}
    return found


async def outputs_of(
    task: run_pb2.TaskRun, items: Sequence[run_pb2.TaskRun], decode: Decode, declared: Sequence[str]
) -> dict[str, Any] | None:
    """Return the outputs of a task by name; None when it has none, because it did not succeed.

    Those of a mapped task are lists, with None for each of its `items` that did not succeed or has no such output.
    """
    if not items:
        if task.state != run_pb2.TASK_STATE_SUCCEEDED:
            return None
        return {name: await decode(payload) for name, payload in ordered(task.outputs, declared).items()}
    names = ordered(dict.fromkeys(name for item in items for name in item.outputs), declared)
    if not names:
        return None
    return {
        name: [await decode(item.outputs[name]) if name in item.outputs else None for item in items] for name in names
    }


def value_of(outputs: dict[str, Any], task: LatticeTask | TaskOutput | str) -> Any:
    """Return a task's outputs as `AsyncRun.output` does: the value of a single one, or all by name.

    Of a task that is known its definition decides, whatever it returned; of one known by its id what it returned does.
    """
    if isinstance(task, TaskOutput):
        return outputs.get(task.output)
    names = tuple(outputs) if isinstance(task, str) else task.definition.outputs
    is_single = len(names) == 1 and (isinstance(task, str) or not task.definition.may_return_more)
    return outputs.get(names[0]) if is_single else outputs


def declared_by(tasks: Iterable[LatticeTask]) -> dict[str, Sequence[str]]:
    """Return the names of the outputs of tasks that have several, in their order."""
    return {task.task_id: task.definition.outputs for task in tasks if len(task.definition.outputs) > 1}


def lack_of(task: run_pb2.TaskRun) -> RunError | None:
    """Return why a task that ended has no outputs; None when it has."""
    if task.state == run_pb2.TASK_STATE_SUCCEEDED:
        return None
    if task.state == run_pb2.TASK_STATE_FAILED:
        return task_error_of(task.run_id, task.task_id, task.failure, 1, task.display_name)
    state = run_pb2.TaskState.Name(task.state).removeprefix("TASK_STATE_").lower()
    text = f"task {task.task_id!r} of run {task.run_id!r} was {state} and has no output"
    return RunError(task.run_id, f"{text}: {task.failure.message}" if task.failure.message else text)


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


def error_of(run: run_pb2.Run, task_name: str = "") -> RunError | None:
    """Return the error of a run that ended otherwise than well; `opened` gives it the original exception as cause.

    `task_name` is the name, for people, of the task that failed.
    """
    if run.state == run_pb2.RUN_STATE_SUCCEEDED:
        return None
    failure = run.failure
    if failure.kind == errors_pb2.FAILURE_KIND_TIMEOUT and not failure.task_id:
        return RunTimeoutError(run.run_id, f"run {run.run_id!r} failed: {failure.message}")
    if run.state == run_pb2.RUN_STATE_CANCELLED:
        return RunCancelledError(run.run_id, f"run {run.run_id!r} was cancelled: {failure.message}")
    return task_error_of(run.run_id, failure.task_id, failure, run.task_counts.failed, task_name)


def task_error_of(
    run_id: str, task_id: str, failure: errors_pb2.Failure, failed_tasks: int, task_name: str
) -> TaskFailedError:
    """Return the error of a task that failed; `opened` gives it the original exception as cause."""
    shown = failure_of(failure)
    message = f"{failure.type}: {failure.message}" if failure.type else failure.message
    error = TaskFailedError(run_id, task_id, shown["kind"], message, failure.traceback, failed_tasks, task_name)
    if failure.HasField("exception"):
        error.exception = failure.exception
    elif failure.type:
        why = "it could not be pickled there, or is not Python's"
        error.missing_cause = f"The worker sent the original exception as text only: {why}"
    return error
