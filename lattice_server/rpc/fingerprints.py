"""Owns the fingerprints by which repeated requests are recognised.

Rule: two requests for one run id are the same when their ids, names, wiring, settings and values are. Code and pickled
values are left out, because a program that starts again may pickle the same value into other bytes.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from lattice.v1 import payload_pb2, task_pb2

from lattice_server.core.model import Function
from lattice_server.engine.runs.entry import fingerprint
from lattice_server.engine.slices import Slices

PICKLED = ("application/vnd.lattice.cloudpickle", "application/vnd.lattice.pickle")
# Encoding a task takes about a microsecond.
SLICE_TASKS = 1000


class GraphFingerprint:
    """The fingerprint of the functions and tasks of a graph; the same whether the graph was sent at once or in parts.

    Stored workflows are compared by all they have, runs without code and pickled values.
    """

    def __init__(self) -> None:
        self._tasks, self._run_tasks = hashlib.sha256(), hashlib.sha256()
        self._functions: dict[str, tuple[str, str]] = {}

    def copy(self) -> "GraphFingerprint":
        """Return a copy to which more tasks can be added."""
        found = GraphFingerprint()
        found._tasks, found._run_tasks = self._tasks.copy(), self._run_tasks.copy()
        found._functions = dict(self._functions)
        return found

    def add_task(self, message: task_pb2.TaskSpec) -> None:
        """Add the next task, in the order of the graph."""
        data = message.SerializeToString(deterministic=True)
        _add(self._tasks, data)
        if any(map(_is_pickled, message.inputs.values())):
            reduced = task_pb2.TaskSpec()
            reduced.CopyFrom(message)
            _drop_pickles_of(reduced.inputs.values())
            data = reduced.SerializeToString(deterministic=True)
        _add(self._run_tasks, data)

    def add_functions(self, functions: Mapping[str, Function]) -> None:
        """Add functions, in any order."""
        self._functions.update((name, (function.digest, function.entrypoint)) for name, function in functions.items())

    def parts(self) -> tuple[bytes, ...]:
        """Return the parts of a stored workflow's fingerprint."""
        named = sorted(self._functions.items())
        return self._tasks.digest(), *(text.encode() for name, (digest, _) in named for text in (name, digest))

    def run_parts(self) -> tuple[bytes, ...]:
        """Return the parts of a run's fingerprint."""
        named = sorted(self._functions.items())
        return self._run_tasks.digest(), *(text.encode() for name, (_, entry) in named for text in (name, entry))


async def request_fingerprint(request: Any, slices: Slices) -> str:
    """Return the fingerprint of a whole request. Its `tasks` may be many, so they are encoded in slices."""
    fields = {field.name: value for field, value in request.ListFields()}
    tasks = hashlib.sha256()
    async for task in slices.each(fields.pop("tasks", ()), size=SLICE_TASKS):
        _add(tasks, task.SerializeToString(deterministic=True))
    rest = type(request)(**fields)
    return fingerprint(rest.SerializeToString(deterministic=True), tasks.digest())


def task_fingerprint(request: task_pb2.RunTaskRequest, function: Function) -> str:
    """Return the fingerprint of a run of one task; empty without a run id. Empties code and pickles in the request."""
    if not request.run_id:
        return ""
    for field in ("request_id", "wait", "bundle"):  # The same run may be waited for in another way.
        request.ClearField(field)
    request.function.Clear()
    if function.entrypoint:
        request.function.entrypoint = function.entrypoint
    _drop_pickles_of(request.task.inputs.values())
    return fingerprint(request.SerializeToString(deterministic=True))


def drop_pickles(payloads: Iterable[payload_pb2.Payload]) -> None:
    """Empty the pickled payloads."""
    for payload in payloads:
        if payload.media_type.startswith(PICKLED):
            payload.ClearField("data")
            payload.ClearField("artifact")


def _drop_pickles_of(bindings: Iterable[payload_pb2.Binding]) -> None:
    for binding in bindings:
        match binding.WhichOneof("source"):
            case "payload":
                drop_pickles((binding.payload,))
            case "list":
                _drop_pickles_of(binding.list.items)
            case "map":
                _drop_pickles_of(binding.map.entries.values())
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


def _add(digest: Any, data: bytes) -> None:
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)
