"""The ways to start a child process, each wrapped so that the child belongs to the attempt that started it."""

import _posixsubprocess
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lattice_worker.runner.coroutines.attempt import here
from lattice_worker.runner.coroutines.children import MARK, STREAMS, Family, Listener, family_of, note

POPEN = ("bufsize", "executable", "stdin", "stdout", "stderr", "preexec_fn", "close_fds", "shell", "cwd", "env")
# Of `fork_exec`: where the child's standard output and error are; -1 for those of the process itself.
FORK_EXEC = {1: 9, 2: 11}
# Processes that `multiprocessing` starts once, for all who use it.
SHARED = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


def track_children() -> None:
    """Have children that attempts start be theirs, and write to a pipe of theirs where they would inherit a stream."""
    listener, owner = Listener(), os.getpid()

    def family() -> Family | None:
        attempt = here()
        return None if attempt is None or os.getpid() != owner else family_of(attempt, listener)

    _wrap_popen(family)
    _wrap_forks(family)
    _wrap_spawns(family)


def _wrap_popen(find: Callable[[], Family | None]) -> None:
    init, system = subprocess.Popen.__init__, os.system

    @functools.wraps(init)
    def init_here(self: "subprocess.Popen[Any]", args: Any, *more: Any, **settings: Any) -> None:
        if (family := find()) is None:
            init(self, args, *more, **settings)
            return
        given = dict(zip(POPEN, more, strict=False)) | settings
        for descriptor, write in family.streams().items():
            if given.get(STREAMS[descriptor]) is None and STREAMS[descriptor] not in POPEN[: len(more)]:
                settings[STREAMS[descriptor]] = write
        if given.get("env") is None and len(more) < len(POPEN):
            settings["env"] = {**os.environ, MARK: family.mark}
        try:
            init(self, args, *more, **settings)
        finally:
            if pid := getattr(self, "pid", None):
                note(family, pid)

    @functools.wraps(system)
    def system_here(command: Any) -> int:
        if (family := find()) is None:
            return system(command)
        sys.audit("os.system", command)
        # As the C library's `system` does, the child gets this process's descriptors and signals.
        process = subprocess.Popen(os.fsencode(command), shell=True, close_fds=False, restore_signals=False)
        code = process.wait()
        family.read()
        return code << 8 if code >= 0 else -code

    subprocess.Popen.__init__ = init_here  # type: ignore[method-assign]
    os.system = system_here


def _wrap_forks(find: Callable[[], Family | None]) -> None:
    def enter_child(family: Family, streams: dict[int, int]) -> None:
        os.environ[MARK] = family.mark
        for descriptor, write in streams.items():
            os.dup2(write, descriptor)

    fork, forkpty = os.fork, os.forkpty

    @functools.wraps(fork)
    def fork_here() -> int:
        if (family := find()) is None:
            return fork()
        streams = family.streams()
        if pid := fork():
            note(family, pid)
        else:
            enter_child(family, streams)
        return pid

    @functools.wraps(forkpty)
    def forkpty_here() -> tuple[int, int]:
        if (family := find()) is None:
            return forkpty()
        family.streams()  # For the descriptors, by which it is known.
        pid, terminal = forkpty()
        if pid:
            note(family, pid)
        else:
            enter_child(family, {})
        return pid, terminal

    os.fork, os.forkpty = fork_here, forkpty_here


def _wrap_spawns(find: Callable[[], Family | None]) -> None:
    def wrapped(spawn: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(spawn)
        def spawn_here(
            path: Any, argv: Any, env: Any, *, file_actions: Sequence[Any] | None = None, **settings: Any
        ) -> int:
            if (family := find()) is None:
                return spawn(path, argv, env, file_actions=file_actions or (), **settings)
            actions = [(os.POSIX_SPAWN_DUP2, write, descriptor) for descriptor, write in family.streams().items()]
            if env is os.environ:
                env = {**env, MARK: family.mark}
            pid = spawn(path, argv, env, file_actions=[*actions, *(file_actions or ())], **settings)
            note(family, pid)
            return pid

        return spawn_here

    fork_exec: Callable[..., int] = _posixsubprocess.fork_exec

    @functools.wraps(fork_exec)
    def fork_exec_here(*given: Any) -> int:
        family = find()
        if family is None or any(name in str(arg) for arg in given[0] for name in SHARED):
            return fork_exec(*given)
        streams, settings = family.streams(), list(given)
        for descriptor, position in FORK_EXEC.items():
            if settings[position] == -1 and descriptor in streams:
                settings[position] = streams[descriptor]
        pid = fork_exec(*settings)
        note(family, pid)
        return pid

    os.posix_spawn, os.posix_spawnp = wrapped(os.posix_spawn), wrapped(os.posix_spawnp)
    _posixsubprocess.fork_exec = fork_exec_here
