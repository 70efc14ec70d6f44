"""Owns which program a worker is. Rule: every executor starts the same one; who starts it on a node imports no more."""

import os
import sys


def worker_command(target: str, flags: list[str]) -> list[str]:
    """Return the command line of a worker that dials `target`, for the Python that runs here."""
    return [sys.executable, "-m", "lattice_worker", "--addr", target, *flags]


def token_flags(token: str) -> list[str]:
    """Put a token into a pipe, of which a worker inherits the end to read; return the flags that name it."""
    reading, writing = os.pipe()
    with open(writing, "w", encoding="utf-8") as pipe:
        # `MAX_TOKEN` fits into a pipe that nothing reads yet.
        pipe.write(token)
    os.set_inheritable(reading, True)
    return ["--token-fd", str(reading)]
