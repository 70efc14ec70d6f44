"""Owns a function in the form in which it is sent: its pickle, and the bundle of modules that the pickle needs.

Rule: code that cannot be sent raises, with the name of the variable that cannot be pickled.
"""

import functools
import sys
from typing import Any, NamedTuple

from lattice.v1 import resources_pb2, task_pb2

from lattice_client.code.blame import blame
from lattice_client.code.bundle import Choice, bundle_for
from lattice_client.code.digests import digest_of
from lattice_client.code.freshness import FileState, Snapshot, StateOf
from lattice_client.code.pickler import FunctionPickler
from lattice_client.errors import TaskDefinitionError

# The module that cloudpickle names in a pickle that contains bytecode.
BY_VALUE = b"cloudpickle.cloudpickle"


class FunctionCode:
    """The code of one function, pickled again only when it changed. `form` is its message without code.

    A function with an entry point has no code to send.
    """

    def __init__(self, function: Any, form: task_pb2.Function, choice: Choice) -> None:
        self._function = function
        self._form = form
        self._choice = choice
        self._snapshot: Snapshot | None = None
        self._packed: tuple[task_pb2.Function, task_pb2.CodeBundle | None] | None = None

    def pack(self, state_of: StateOf | None = None) -> tuple[task_pb2.Function, task_pb2.CodeBundle | None]:
        """Return the function with its present code, and the bundle it needs; `state_of` as in `Snapshot.is_current`.

        Raises TaskDefinitionError.
        """
        if self._snapshot is None or not self._snapshot.is_current(state_of):
            # Taken before pickling, so that a later check sees a change during it.
            snapshot = Snapshot(self._function)
            files = self._pack()
            self._snapshot = snapshot.with_files(files)
        return self.packed

    @property
    def packed(self) -> tuple[task_pb2.Function, task_pb2.CodeBundle | None]:
        """The function and its bundle as `pack` returned them last."""
        assert self._packed is not None, "pack is called before a function is sent"
        return self._packed

    def _pack(self) -> tuple[FileState, ...]:
        function, bundle = task_pb2.Function(), None
        function.CopyFrom(self._form)
        files: tuple[FileState, ...] = ()
        if not function.entrypoint:
            function.python.pickle, bundle, files = pack(self._function, function.display_name, self._choice)
            function.bundle_digest = bundle.digest if bundle else ""
            if (runtime := runtime_of(function.python.pickle)) is not None:
                function.runtime.CopyFrom(runtime)
        function.digest = digest_of(function)
        self._packed = function, bundle
        return files


class Packed(NamedTuple):
    """The pickle of a function, its bundle, and the states of the bundle's files."""

    pickle: bytes
    bundle: task_pb2.CodeBundle | None
    files: tuple[FileState, ...]


def pack(function: Any, label: str = "task", choice: Choice | None = None) -> Packed:
    """Return the pickle of a function and its bundle. Raises TaskDefinitionError, which names the task `label`."""
    pickler = FunctionPickler(function)
    try:
        pickler.dump_function()
    except Exception as error:
        raise TaskDefinitionError(f"task {label!r} {blame(function, error)}") from error
    # Its own module is always sent: inputs are often instances of classes that are defined there.
    bundle, left_out = bundle_for({*pickler.modules, *_module_of(function)}, pickler.codes, choice)
    pickled = pickler.getvalue(sources=pickler.sources(), left_out=left_out)
    return Packed(pickled, *bundle) if bundle else Packed(pickled, None, ())


def runtime_of(pickled: bytes) -> resources_pb2.Runtime | None:
    """Return the runtime that a pickled function needs: this version of Python if it contains bytecode, else None."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return resources_pb2.Runtime(language="python", version=version) if BY_VALUE in pickled else None


def _module_of(function: Any) -> set[str]:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__module__", None)
    return {name} if isinstance(name, str) else set()
