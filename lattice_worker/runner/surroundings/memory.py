"""The memory limit of an invocation that has its process for itself."""

import contextlib
import resource
import threading
from collections.abc import Iterator

# How far a task may exceed the memory it asked for: memory is counted in pages, and before it is used.
MEMORY_SLACK_BYTES = 64 * 1024 * 1024
STACK_BYTES = 8 * 1024 * 1024  # Of a thread, unless `threading.stack_size` says otherwise.
UNLIMITED = contextlib.nullcontext()


def memory_limit(limit_bytes: int) -> contextlib.AbstractContextManager[None]:
    """Let this process grow by `limit_bytes` and a little; beyond that allocations raise MemoryError. 0: no limit."""
    return _limited(limit_bytes) if limit_bytes else UNLIMITED


@contextlib.contextmanager
def _limited(limit_bytes: int) -> Iterator[None]:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    with open("/proc/self/status") as status:
        used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    wanted = used + limit_bytes + MEMORY_SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard < 0 else min(wanted, hard), hard))
    try:
        yield
    finally:
        lift_memory_limit()


def lift_memory_limit() -> None:
    """Let this process grow again as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def allow_stack() -> None:
    """Let a memory limit grow by a thread's stack, which the limit counts whole though little of it is ever used."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if soft not in {resource.RLIM_INFINITY, hard}:
        resource.setrlimit(resource.RLIMIT_DATA, (soft + (threading.stack_size() or STACK_BYTES), hard))
