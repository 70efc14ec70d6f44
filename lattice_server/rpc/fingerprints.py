"""Owns what tells whether two requests mean the same. Rule: a graph has one print, however it was sent."""

import hashlib
from collections.abc import Mapping
from typing import Any

from lattice.v1 import task_pb2

from lattice_server.core.model import Function
from lattice_server.engine.run_entry import fingerprint
from lattice_server.engine.slices import Slices
from lattice_server.rpc.sameness import has_pickles, reduced


class GraphPrint:
    """What tells two graphs apart, besides what little a workflow has around its tasks.

    Two stored workflows are the same by all they have. Of two runs code and pickled values are not compared; see
    `sameness`.
    """

    def __init__(self) -> None:
        self._tasks, self._run_tasks = hashlib.sha256(), hashlib.sha256()
        self._functions: dict[str, tuple[str, str]] = {}

    def copy(self) -> "GraphPrint":
        """Return one that more can be added to."""
        found = GraphPrint()
        found._tasks, found._run_tasks = self._tasks.copy(), self._run_tasks.copy()
        found._functions = dict(self._functions)
        return found

    def add_task(self, message: task_pb2.TaskSpec) -> None:
        """Add a task, after those before it."""
        data = message.SerializeToString(deterministic=True)
        _add(self._tasks, data)
        if has_pickles(message):
            data = reduced(message).SerializeToString(deterministic=True)
        _add(self._run_tasks, data)

    def add_functions(self, functions: Mapping[str, Function]) -> None:
        """Add functions, in any order."""
        self._functions.update((name, (function.digest, function.entrypoint)) for name, function in functions.items())

    def parts(self) -> tuple[bytes, ...]:
        """Return what the fingerprint of a stored workflow is made of."""
        named = sorted(self._functions.items())
        return self._tasks.digest(), *(text.encode() for name, (digest, _) in named for text in (name, digest))

    def run_parts(self) -> tuple[bytes, ...]:
        """Return what the fingerprint of a run is made of."""
        named = sorted(self._functions.items())
        return self._run_tasks.digest(), *(text.encode() for name, (_, entry) in named for text in (name, entry))


async def fingerprint_of(request: Any, slices: Slices) -> str:
    """Return the fingerprint of a request, whose `tasks` may be many."""
    fields = {field.name: value for field, value in request.ListFields()}
    tasks = hashlib.sha256()
    async for task in slices.each(fields.pop("tasks", ()), size=SLICE_TASKS):
        _add(tasks, task.SerializeToString(deterministic=True))
    rest = type(request)(**fields)
    return fingerprint(rest.SerializeToString(deterministic=True), tasks.digest())


# Of tasks that are only encoded: a microsecond each.
SLICE_TASKS = 1000


def _add(digest: Any, data: bytes) -> None:
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)
