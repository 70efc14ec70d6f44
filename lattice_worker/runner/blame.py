"""Which part of a value keeps it from being pickled. Rule: its parts are tried one by one, inwards."""

import pickle
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from lattice_worker.runner import pickler
from lattice_worker.runner.text import message_of, type_name, utf8

MAX_DEPTH = 8
# Of one value: a list may have millions of items, each of which takes a pickler of its own.
MAX_PARTS = 10_000


def refusal(what: str, value: Any, error: BaseException) -> str:
    """Return that `what`, such as an input by name, cannot be pickled because of `error`, and which part of it is it.

    It runs code of the value's own, which has failed before.
    """
    path, found = _path(value)
    return f"{', '.join([what, *path])} ({type_name(type(found))}) cannot be pickled: {message_of(error)}"


def _path(value: Any) -> tuple[list[str], Any]:
    path: list[str] = []
    seen = {id(value)}
    while len(path) < MAX_DEPTH:
        try:
            parts = islice(_parts(value), MAX_PARTS)
            name, found = next((name, part) for name, part in parts if id(part) not in seen and not _is_picklable(part))
        except BaseException:  # no part is at fault by itself, or the value cannot be looked into
            break
        seen.add(id(found))
        path.append(utf8(name))
        value = found
    return path, value


def _is_picklable(value: Any) -> bool:
    buffers: list[pickle.PickleBuffer] = []
    try:
        pickler.dumps(value, buffers.append)
    except BaseException:  # SystemExit too: pickling runs code of the value's own
        return False
    return True


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield f"entry {key!r}", item
    elif isinstance(value, list | tuple | set | frozenset):
        for place, item in enumerate(value):
            yield f"item {place}", item
    else:
        for name, item in getattr(value, "__dict__", {}).items():
            yield f"attribute {name!r}", item
