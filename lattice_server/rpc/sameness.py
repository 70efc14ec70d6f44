"""Owns what makes two requests for one run id the same.

Rule: ids, names, wiring, settings and values count, but for what is pickled, code and values: a program that starts
again pickles the same things into other bytes.
"""

from collections.abc import Iterable

from lattice.v1 import payload_pb2, task_pb2

from lattice_server.core.model import Function
from lattice_server.engine.run_entry import fingerprint

PICKLED = ("application/vnd.lattice.cloudpickle", "application/vnd.lattice.pickle")


def has_pickles(task: task_pb2.TaskSpec) -> bool:
    """Whether a task is given a pickled value."""
    return any(map(_is_pickled, task.inputs.values()))


def reduced(task: task_pb2.TaskSpec) -> task_pb2.TaskSpec:
    """Return a task without what its pickled values hold."""
    found = task_pb2.TaskSpec()
    found.CopyFrom(task)
    _reduce_bindings(found.inputs.values())
    return found


def reduce_values(payloads: Iterable[payload_pb2.Payload]) -> None:
    """Empty the pickled ones among values."""
    for payload in payloads:
        _reduce_value(payload)


def task_fingerprint(request: task_pb2.RunTaskRequest, function: Function) -> str:
    """Return what the run of one task is started with, as a digest; nothing without a run id.

    The request is not whole any more after it.
    """
    if not request.run_id:
        return ""
    for field in ("request_id", "wait", "bundle"):  # How long a caller waits makes it no other run.
        request.ClearField(field)
    _reduce_function(request.function, function)
    _reduce_bindings(request.task.inputs.values())
    return fingerprint(request.SerializeToString(deterministic=True))


def _reduce_function(message: task_pb2.Function, function: Function) -> None:
    message.Clear()
    if function.entrypoint:
        message.entrypoint = function.entrypoint


def _reduce_bindings(bindings: Iterable[payload_pb2.Binding]) -> None:
    for binding in bindings:
        match binding.WhichOneof("source"):
            case "payload":
                _reduce_value(binding.payload)
            case "list":
                _reduce_bindings(binding.list.items)
            case "map":
                _reduce_bindings(binding.map.entries.values())
            case _:
                pass


def _is_pickled(binding: payload_pb2.Binding) -> bool:
    match binding.WhichOneof("source"):
        case "payload":
            return binding.payload.media_type.startswith(PICKLED)
        case "list":
            return any(map(_is_pickled, binding.list.items))
        case "map":
            return any(map(_is_pickled, binding.map.entries.values()))
        case _:
            return False


def _reduce_value(payload: payload_pb2.Payload) -> None:
    if payload.media_type.startswith(PICKLED):
        payload.ClearField("data")
        payload.ClearField("artifact")
