"""Owns the class of a failure by the last output of a program. Rule: the first pattern that matches decides.

Engines write the cause first and its consequences after it, so that the lines are read from the top.
"""

import re
from collections.abc import Sequence

from lattice_server.core.services.model import FailureKind, ServiceFailure

# The statuses by which a shell, and `execvp`, say that a program cannot be executed, or was not found.
NOT_EXECUTABLE = frozenset({126, 127})
# Python's argparse and click end with it when they do not know an argument.
BAD_USAGE = 2
LAST_LINES, LAST_BYTES = 60, 8 * 1024

# What engines for models write; the texts are those of vLLM and transformers.
_MODEL_PATTERNS: Sequence[tuple[FailureKind, str]] = (
    (FailureKind.PORT_IN_USE, r"address already in use|errno 98"),
    (FailureKind.OUT_OF_GPU_MEMORY, r"free memory on device .* is less than desired GPU memory utilization"),
    (FailureKind.OUT_OF_GPU_MEMORY, r"CUDA out of memory|torch\.OutOfMemoryError"),
    (FailureKind.KV_CACHE_TOO_SMALL, r"no available memory for the cache blocks"),
    (FailureKind.KV_CACHE_TOO_SMALL, r"to serve at least one request with the model's max seq len"),
    (FailureKind.DTYPE_UNSUPPORTED, r"bfloat16 is only supported on GPUs with compute capability"),
    # Tracebacks and usages show the name of the argument alone.
    (FailureKind.MODEL_NOT_TRUSTED, r"trust_remote_code=True"),
    (FailureKind.MODEL_NOT_FOUND, r"invalid repository ID or local directory specified"),
    (FailureKind.MODEL_NOT_FOUND, r"repo id must be in the form 'repo_name' or 'namespace/repo_name'"),
    (FailureKind.MODEL_NOT_FOUND, r"is not a local folder and is not a valid model identifier"),
    (FailureKind.MODEL_NOT_FOUND, r"couldn't connect to 'https?://[^']*' to load the files"),
    (FailureKind.MODEL_NOT_FOUND, r"incorrect path_or_model_id|does not appear to have a file named config\.json"),
    (FailureKind.TOO_FEW_GPUS, r"world size \(\d+\) is larger than the number of"),
)
_PATTERNS: Sequence[tuple[FailureKind, str]] = (
    (FailureKind.PORT_IN_USE, r"address already in use|EADDRINUSE"),
    (FailureKind.OUT_OF_MEMORY, r"^MemoryError\b|cannot allocate memory"),
)


def failure_of(
    exit_status: int | None, signal: int, lines: Sequence[str], *, is_engine: bool = False, message: str = ""
) -> ServiceFailure:
    """Return the failure of a program that ended by itself; `lines` are its last ones."""
    kind = _kind_of(exit_status, signal, lines, is_engine)
    said = f"signal {signal} ended its program" if signal else f"its program exited with status {exit_status}"
    last = last_lines(lines)
    cause = _line_of(kind, lines, is_engine)
    text = message or (f"{said}: {cause}" if cause else said)
    return ServiceFailure(kind, text, None if signal else exit_status, signal, last)


def last_lines(lines: Sequence[str]) -> tuple[str, ...]:
    """Return the last lines, within the bounds of a failure."""
    found: list[str] = []
    size = 0
    for line in reversed(lines[-LAST_LINES:]):
        size += len(line.encode()) + 1
        if size > LAST_BYTES:
            break
        found.append(line)
    return tuple(reversed(found))


def _kind_of(exit_status: int | None, signal: int, lines: Sequence[str], is_engine: bool) -> FailureKind:
    if exit_status in NOT_EXECUTABLE:
        return FailureKind.COMMAND_NOT_FOUND
    patterns = _MODEL_PATTERNS if is_engine else _PATTERNS
    for line in lines:
        for kind, pattern in patterns:
            if re.search(pattern, line, re.IGNORECASE):
                return kind
    if signal:
        return FailureKind.SIGNALED
    return FailureKind.BAD_ARGUMENTS if exit_status == BAD_USAGE else FailureKind.EXITED


def _line_of(kind: FailureKind, lines: Sequence[str], is_engine: bool) -> str:
    """Return the line with the cause: the line that matched, or else the last line."""
    patterns = [pattern for found, pattern in (_MODEL_PATTERNS if is_engine else _PATTERNS) if found is kind]
    for line in lines:
        if any(re.search(pattern, line, re.IGNORECASE) for pattern in patterns):
            return line.strip()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
