"""The failure that describes the error of an invocation.

Rule: an error is user code, and so is all it refers to; it is described even if its methods raise.
"""

import concurrent.futures._base
import contextlib
import os
import pickle
import traceback
from collections.abc import Iterator
from typing import Any

import cloudpickle

import lattice_worker
from lattice_worker.runner.encoding.artifacts import Encoder, StoreFullError
from lattice_worker.runner.encoding.exceptions import pickled
from lattice_worker.runner.encoding.text import MESSAGE_CHARACTERS, clipped, message_of, type_name, utf8
from lattice_worker.runner.encoding.values import PayloadError
from lattice_worker.runner.invocation.functions import shown

# The files of the worker, and the module by which tasks call it.
HERE = os.path.dirname(lattice_worker.__file__) + os.sep
CONTEXT = os.sep + os.path.join("lattice_client", "context.py")
WAITS = concurrent.futures._base.__file__
# What pickles values: where that fails it is the value that is at fault, and the message says which part of it.
PICKLING = (os.path.dirname(cloudpickle.__file__) + os.sep, pickle.__file__)
# With the message, and in bytes, the text of a failure stays below 64 KiB unless it is mostly not Latin.
TRACEBACK_CHARACTERS = 40 * 1024
FAILURE_BYTES = 64 * 1024
MAX_EXCEPTION_BYTES = 64 * 1024
MAX_FRAMES = 100
MAX_BASES = 64
# Kinds of failures whose errors are not the user's.
OURS = frozenset({"payload", "resources"})


def failure_of(error: BaseException, encoder: Encoder) -> dict[str, Any]:
    """Return the failure an error is. Never raises; how long it takes is up to the error's own methods."""
    kind = "user_error"
    if isinstance(error, MemoryError):
        kind = "out_of_memory"
    elif isinstance(error, PayloadError):
        kind = "payload"
    elif isinstance(error, StoreFullError):
        kind = "resources"
    failure: dict[str, Any] = {"kind": kind, "type": "", "message": "the error cannot be described"}
    with contextlib.suppress(BaseException):
        failure["type"] = "" if kind in OURS else type_name(type(error))
    failure["message"] = message_of(error)
    with contextlib.suppress(BaseException):
        text = _traceback(error, is_ours=kind in OURS)
        failure["traceback"] = _fitting(clipped(text, TRACEBACK_CHARACTERS), failure["message"])
    if kind in OURS:
        return failure
    with contextlib.suppress(BaseException):
        bases = [cls for cls in type(error).__mro__[1:] if cls is not object]
        failure["base_types"] = [type_name(cls) for cls in bases[:MAX_BASES]]
    with contextlib.suppress(BaseException):  # An exception that cannot be pickled is still told in text.
        blob = pickled(BaseException.with_traceback(error, None))
        if len(blob) <= MAX_EXCEPTION_BYTES:
            encoder.blobs.append(blob)
            failure["exception"] = len(encoder.blobs) - 1
    return failure


def _traceback(error: BaseException, *, is_ours: bool) -> str:
    """Return what Python prints of an error, groups, causes, contexts and notes included, from user code on.

    Of an error that `is_ours` that is nothing when no user code took part.
    """
    summary = traceback.TracebackException.from_exception(error, limit=None, compact=True)
    seen: set[int] = set()
    hidden = (HERE, *PICKLING) if is_ours else (HERE,)
    pending, has_frames = [summary], not is_ours
    while pending:
        found = pending.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        kept = list(_kept(found.stack, hidden))
        has_frames = has_frames or bool(kept)
        if len(kept) > MAX_FRAMES:
            kept = [*kept[: MAX_FRAMES // 2], *kept[-MAX_FRAMES // 2 :]]
        for frame in kept:
            frame.filename = shown(frame.filename)
        found.stack[:] = kept
        _clip(found)
        pending += [other for other in (found.__cause__, found.__context__, *(found.exceptions or ())) if other]
    return utf8("".join(summary.format())) if has_frames else ""


def _kept(frames: traceback.StackSummary, hidden: tuple[str, ...]) -> Iterator[traceback.FrameSummary]:
    """Yield frames that are not of the worker, nor of a wait in it."""
    is_hidden = False
    for frame in frames:
        is_wait = is_hidden and frame.filename == WAITS
        is_hidden = is_wait or frame.filename.startswith(hidden) or frame.filename.endswith(CONTEXT)
        if not is_hidden:
            yield frame


def _clip(summary: traceback.TracebackException) -> None:
    """Shorten the texts in a summary before they are joined: an error may have many megabytes of them."""
    text = getattr(summary, "_str", None)
    if isinstance(text, str):
        summary._str = clipped(text, MESSAGE_CHARACTERS)  # type: ignore[attr-defined]
    notes = getattr(summary, "__notes__", None)
    if isinstance(notes, list | tuple):
        summary.__notes__ = [clipped(n, MESSAGE_CHARACTERS) if isinstance(n, str) else n for n in notes[:MAX_FRAMES]]


def _fitting(text: str, message: str) -> str:
    """Return text cut so that it and the message take at most `FAILURE_BYTES` of UTF-8."""
    left = FAILURE_BYTES - len(message.encode())
    while len(encoded := text.encode()) > left:
        text = clipped(text, len(text) * left // len(encoded) * 9 // 10)
    return text
