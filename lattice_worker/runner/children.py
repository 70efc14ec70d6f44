"""Child processes of async invocations, which share a process: whose they are, and where their output goes."""

import asyncio
import contextlib
import contextvars
import functools
import os
import subprocess
import weakref
from typing import Any

from lattice_worker.runner.output import Output, current
from lattice_worker.runner.reset import kill_tree

READ_BYTES = 1 << 16


class _Family:
    """The children of one invocation, and the pipes that they inherit as their standard streams."""

    def __init__(self, output: Output, loop: asyncio.AbstractEventLoop, context: contextvars.Context) -> None:
        self.processes: list[subprocess.Popen[Any]] = []
        self._output, self._loop, self._context = weakref.ref(output), loop, context
        self._pipes: dict[str, tuple[int, int]] = {}

    def stream(self, name: str) -> int:
        """Return the descriptor a child is to write to."""
        if name not in self._pipes:
            read, write = os.pipe()
            os.set_blocking(read, False)
            self._pipes[name] = read, write
            self._loop.call_soon_threadsafe(self._listen, name, read, context=self._context)
        return self._pipes[name][1]

    def _listen(self, name: str, read: int) -> None:
        if self._pipes.get(name, (-1, -1))[0] == read:
            self._loop.add_reader(read, self._read, name, read)

    def _read(self, name: str, read: int) -> bool:
        try:
            data = os.read(read, READ_BYTES)
        except OSError:
            return False
        if data and (output := self._output()) is not None:
            output.write(name, data.decode(errors="replace"))
        return bool(data)

    def end(self) -> None:
        """Kill the children that still run, and read what all of them wrote."""
        for process in self.processes:
            if process.poll() is None:
                kill_tree(process.pid)
        pipes, self._pipes = self._pipes, {}
        for name, (read, write) in pipes.items():
            self._loop.remove_reader(read)
            os.close(write)
            while self._read(name, read):
                pass
            os.close(read)


_families: "weakref.WeakKeyDictionary[Output, _Family]" = weakref.WeakKeyDictionary()


def keep_apart(loop: asyncio.AbstractEventLoop, context: contextvars.Context) -> None:
    """Have children that invocations start write to a pipe of their invocation where they would inherit a stream."""
    init = subprocess.Popen.__init__

    @functools.wraps(init)
    def init_here(self: "subprocess.Popen[Any]", args: Any, *more: Any, **settings: Any) -> None:
        output = current.get()
        if output is not None:
            family = _families.get(output)
            if family is None:
                family = _families[output] = _Family(output, loop, context)
            for position, name in ((3, "stdout"), (4, "stderr")):
                if len(more) <= position and settings.get(name) is None:
                    with contextlib.suppress(OSError):  # Short of descriptors: the child inherits the process's own.
                        settings[name] = family.stream(name)
            family.processes.append(self)
        init(self, args, *more, **settings)

    subprocess.Popen.__init__ = init_here  # type: ignore[method-assign]


def end(output: Output) -> None:
    """End the children of an invocation that is over."""
    if (family := _families.pop(output, None)) is not None:
        family.end()
