"""Owns which program a worker is. Rule: every executor starts the same one; who starts it on a node imports no more."""

import sys


def worker_command(target: str, flags: list[str]) -> list[str]:
    """Return the command line of a worker that dials `target`, for the Python that runs here."""
    return [sys.executable, "-m", "lattice_worker", "--addr", target, *flags]
