"""Owns how the worker's token gets into its memory, and stays out of sight of the tasks it runs.

Tasks may be processes of the same user. That user's processes read each other's environment, descriptors and memory,
so a token in the environment of a worker would be every task's. Rule: a token comes by a pipe, is read once, and lies
in a process that other processes of the user may not look into.
"""

import ctypes
import os
import resource
import sys
from collections.abc import MutableMapping, Sequence

TOKEN = "LATTICE_TOKEN"
FLAG = "--token-fd"
MAX_TOKEN = 4096  # Fits into a pipe that nothing reads yet, also when each character takes four bytes.
PR_SET_DUMPABLE = 4


def hide() -> None:
    """Let no process without privileges read this one's memory, environment or descriptors, or trace it."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        sys.exit("lattice_worker: this process cannot be hidden from others, so it takes no secret")


def keep_secrets() -> None:
    """Hide this process, and let neither it nor its children leave a core file, before it takes secrets."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hide()


def read_token(descriptor: int) -> str:
    """Return the content of a pipe, and close it."""
    with open(descriptor, encoding="utf-8") as pipe:
        return pipe.read()


def move_token(environment: MutableMapping[str, str], command: Sequence[str]) -> None:
    """Start this program anew without the token in its environment, if it has one there.

    The environment that a process was started with stays readable as long as it lives, even if it changes later.
    """
    token = environment.pop(TOKEN, "")
    if not token:
        return
    if len(token) > MAX_TOKEN:
        sys.exit(f"lattice_worker: {TOKEN} has more than {MAX_TOKEN} characters")
    reading, writing = os.pipe()
    with open(writing, "w", encoding="utf-8") as pipe:
        pipe.write(token)
    os.set_inheritable(reading, True)
    os.execve(sys.executable, [*command, FLAG, str(reading)], dict(environment))
