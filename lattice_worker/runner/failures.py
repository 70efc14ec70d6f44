"""What a failed invocation tells about its error."""

import asyncio
import contextlib
import os
import traceback
from typing import Any

import cloudpickle

from lattice_worker.runner.artifacts import Encoder
from lattice_worker.runner.values import PayloadError

HERE = os.path.dirname(__file__)
MAX_EXCEPTION_BYTES = 64 * 1024


def _trace(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(HERE)]
    cause = traceback.format_exception(error.__cause__) if error.__cause__ is not None else []
    head = ["Traceback (most recent call last):\n", *traceback.format_list(frames)] if frames else []
    return "".join([*cause, *head, *traceback.format_exception_only(error)])


def failure_of(error: BaseException, encoder: Encoder) -> dict[str, Any]:
    match error:
        case asyncio.CancelledError():
            return {"kind": "cancelled", "message": "the attempt was cancelled", "type": ""}
        case PayloadError():
            return {"kind": "payload", "message": str(error), "type": "", "traceback": _trace(error)}
        case MemoryError():
            kind = "out_of_memory"
        case _:
            kind = "user_error"
    name, *bases = [_type_name(cls) for cls in type(error).__mro__ if cls is not object]
    failure: dict[str, Any] = {"kind": kind, "type": name, "message": str(error), "traceback": _trace(error)}
    failure["base_types"] = bases
    with contextlib.suppress(Exception):  # an exception that cannot be pickled is still told in text
        stripped = error.with_traceback(None)
        pickled = cloudpickle.dumps(stripped)
        if len(pickled) <= MAX_EXCEPTION_BYTES:
            encoder.blobs.append(pickled)
            failure["exception"] = len(encoder.blobs) - 1
    return failure


def _type_name(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ in {"builtins", "__main__"} else f"{cls.__module__}.{cls.__qualname__}"
