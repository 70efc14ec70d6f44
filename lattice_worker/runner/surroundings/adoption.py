"""How a process takes the environment of the key that it is assigned to. Rule: it comes before any code of a task."""

import ctypes
import os
import resource
import time
from typing import Any

PR_SET_DUMPABLE = 4


def adopt(header: dict[str, Any]) -> None:
    """Set the environment variables of a frame. A process that has secrets leaves no core file.

    With `is_hidden` also no other process of its user reads its memory.
    """
    if header["has_secrets"]:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if header["is_hidden"] and ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        os._exit(1)
    os.environ.update(header["environment"])
    if "TZ" in header["environment"]:
        time.tzset()
