"""Owns what tells whether two requests mean the same. Rule: a graph has one print, however it was sent."""

import hashlib
from collections.abc import Mapping
from typing import Any

from google.protobuf.message import Message

from lattice_server.core.model import Function
from lattice_server.engine.run_entry import fingerprint
from lattice_server.engine.slices import Slices


class GraphPrint:
    """What tells two graphs apart, besides what little a workflow has around its tasks."""

    def __init__(self) -> None:
        self._tasks = hashlib.sha256()
        self._functions: dict[str, str] = {}

    def copy(self) -> "GraphPrint":
        """Return one that more can be added to."""
        found = GraphPrint()
        found._tasks, found._functions = self._tasks.copy(), dict(self._functions)
        return found

    def add_task(self, message: Message) -> None:
        """Add a task, after those before it."""
        _add(self._tasks, message)

    def add_functions(self, functions: Mapping[str, Function]) -> None:
        """Add functions, in any order."""
        self._functions.update((name, function.digest) for name, function in functions.items())

    def parts(self) -> tuple[bytes, ...]:
        """Return what a fingerprint is made of."""
        named = sorted(self._functions.items())
        return self._tasks.digest(), *(text.encode() for pair in named for text in pair)


async def fingerprint_of(request: Any, slices: Slices) -> str:
    """Return the fingerprint of a request, whose `tasks` may be many."""
    fields = {field.name: value for field, value in request.ListFields()}
    tasks = hashlib.sha256()
    async for task in slices.each(fields.pop("tasks", ()), size=SLICE_TASKS):
        _add(tasks, task)
    rest = type(request)(**fields)
    return fingerprint(rest.SerializeToString(deterministic=True), tasks.digest())


# Of tasks that are only encoded: a microsecond each.
SLICE_TASKS = 1000


def _add(digest: Any, message: Message) -> None:
    data = message.SerializeToString(deterministic=True)
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)
