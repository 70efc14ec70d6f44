"""Loading the user's functions, and what surrounds one while it runs."""

import errno
import importlib
import io
import linecache
import os
import pickle
import pickletools
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from lattice_worker.runner.encoding.pickler import FunctionPickler
from lattice_worker.runner.encoding.text import message_of, type_name
from lattice_worker.runner.encoding.values import PayloadError

# Where a process that a task starts with `multiprocessing` finds the pickle of the task's function.
SCRIPT_VARIABLE = "LATTICE_TASK_FUNCTION"
SPAWNED = "lattice_worker.runner.spawned"


_bundles: list[str] = []  # Where files of the project are here.


class Loaded:
    """A function, its script as the `__main__` module, and the facts that came with its pickle."""

    def __init__(self, function: Callable[..., Any], main: ModuleType | None = None) -> None:
        self.function = function
        self.main = main or ModuleType("__main__")
        self._left_out: dict[str, str] = {}
        self._sources: dict[str, tuple[int, None, list[str], str]] = {}

    def learn(self, facts: dict[str, Any]) -> None:
        """Take the facts about the function; see `pickler`."""
        self._left_out = facts.get("left_out", {})
        for name, parts in facts.get("sources", {}).items():
            lines: list[str] = []
            for first, text in parts.items():
                lines += ["\n"] * (first - 1 - len(lines))
                lines[first - 1 :] = text.splitlines(keepends=True)
            self._sources[name] = (0, None, lines, name)

    def enter(self) -> None:
        """Make its script this process's `__main__`, and its source text known to tracebacks.

        Coroutine functions of several scripts that run in one process have the `__main__` of the last that started.
        """
        sys.modules["__main__"] = sys.modules["__mp_main__"] = self.main
        linecache.cache.update(self._sources)

    def explain(self, error: BaseException) -> None:
        """Add a note to an error, and to its causes, that says why the client did not send a missing module."""
        chain: list[BaseException | None] = [error]
        seen: set[int] = set()
        while chain:
            if (found := chain.pop()) is None or id(found) in seen:
                continue
            seen.add(id(found))
            chain += [found.__cause__, found.__context__]
            if reason := reason_of(found, self._left_out):
                found.add_note(reason)


def note_sealed() -> None:
    """Record that this process is sealed: it has a folder of its own, and no other process opens its descriptors."""
    _Spec.is_sealed = True


def reason_of(error: BaseException, left_out: dict[str, str]) -> str:
    """Return why a module or a file that an error misses was not sent; nothing for other errors."""
    match error:
        case ModuleNotFoundError(name=str(module)):
            parts = module.split(".")
            for name in (".".join(parts[:end]) for end in range(len(parts), 0, -1)):
                if name in left_out:
                    return f"module {name!r} {left_out[name]}"
            text = "was not among the imports that the client found; name it in modules=[...] of the task"
            return f"module {module!r} {text}, or install it where the worker runs"
        case OSError(filename=None) if _Spec.is_sealed and _is_refused_network(error):
            if "HTTP_PROXY" in os.environ:
                return "this sandbox reaches only the servers that network=[...] of the task lists"
            return "this sandbox has no network: name the servers that the task needs, as network=['example.com:443']"
        case FileNotFoundError(filename=str(path)):
            if not os.path.isabs(path) and any(os.path.exists(os.path.join(bundle, path)) for bundle in _bundles):
                return f"{path!r} was sent with the task and lies beside its modules: Path(__file__).parent / {path!r}"
            found = (name for name in left_out if path.endswith(f"/{name}"))
            return next((f"file {name!r} {left_out[name]}" for name in found), "")
    return ""


def _is_refused_network(error: OSError) -> bool:
    if error.errno == errno.EPERM:
        # Sockets cannot be made; other calls are refused in this way too.
        return any(frame.filename == socket.__file__ for frame in traceback.extract_tb(error.__traceback__))
    return error.errno == errno.ENETUNREACH or isinstance(error, socket.gaierror)


def shown(filename: str) -> str:
    """Return the name of a file as the user knows it: that of a file of the project is relative to the project."""
    return next((filename.removeprefix(bundle) for bundle in _bundles if filename.startswith(bundle)), filename)


def dump(function: Callable[..., Any]) -> bytes:
    """Return a function as it travels. Raises PayloadError."""
    pickler = FunctionPickler(function)
    try:
        pickler.dump_function()
    except Exception as error:
        raise PayloadError(f"a function cannot be pickled: {error}") from error
    return pickler.getvalue(sources=pickler.sources())


def load(definition: dict[str, Any], blob: bytes) -> Loaded:
    """Return a function as a client or another task sent it. Raises PayloadError."""
    try:
        if definition["bundle"]:
            _prefer(definition["bundle"])
        match definition["code"]:
            case "pickle":
                return load_pickle(blob, definition["bundle"])
            case "entrypoint":
                return _load_entrypoint(definition["entrypoint"])
            case _:
                return _load_source(definition["function"], definition["name"], blob.decode())
    except MemoryError:
        raise
    except BaseException as error:
        text = f"the function {definition['name']!r} cannot be loaded here: "
        text += f"{type_name(type(error))}: {message_of(error)}"
        if definition["code"] == "pickle":
            reason = reason_of(error, _left_out(blob))
        else:
            # The client does not look for the imports of other code.
            reason = "install it where the worker runs" if isinstance(error, ModuleNotFoundError) else ""
        raise PayloadError(f"{text}; {reason}" if reason else text) from error


def load_pickle(blob: bytes, bundle: str = "") -> Loaded:
    """Return a function from its pickle. Parts of its script live in a `__main__` module that is made for it."""
    before, main = sys.modules["__main__"], ModuleType("__main__")
    sys.modules["__main__"] = main
    try:
        loaded = _unpickle(blob, main)
    finally:
        sys.modules["__main__"] = before
    script = str(getattr(main, "__file__", ""))
    if bundle and script and not os.path.exists(script):
        # Files that are sent along lie there as they lie beside the script.
        main.__file__ = os.path.join(bundle, os.path.basename(script))
    return loaded


def _unpickle(blob: bytes, main: ModuleType) -> Loaded:
    stream = io.BytesIO(blob)
    unpickler = pickle.Unpickler(stream)
    loaded = Loaded(unpickler.load(), main)
    while stream.tell() < len(blob) and (names := unpickler.load()) is not None:
        vars(main).update(names)
        main.__spec__ = _Spec(blob)  # type: ignore[assignment]
    if stream.tell() < len(blob):
        loaded.learn(pickle.load(stream))
    return loaded


def _left_out(blob: bytes) -> dict[str, str]:
    stream, start = io.BytesIO(blob), 0
    while stream.tell() < len(blob):
        start = stream.tell()
        for _ in pickletools.genops(stream):
            pass
    facts = pickle.loads(blob[start:]) if start else None
    return facts.get("left_out", {}) if isinstance(facts, dict) else {}


def _load_entrypoint(entrypoint: str) -> Loaded:
    module, _, name = entrypoint.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return Loaded(getattr(found, "__wrapped__", found))


def _load_source(function: str, label: str, source: str) -> Loaded:
    filename = f"<{label or function}>"
    namespace: dict[str, Any] = {"__name__": "__lattice_source__"}
    exec(compile(source, filename, "exec"), namespace)
    if function not in namespace:
        defined = ", ".join(name for name in namespace if not name.startswith("__")) or "nothing"
        raise NameError(f"the source has no {function!r}; it has {defined}")
    loaded = Loaded(namespace[function])
    loaded.learn({"sources": {filename: {1: source}}})
    return loaded


class _Spec:
    """The spec of a script.

    `multiprocessing` asks for its name when it starts a process by `spawn` or `forkserver`, and has that process run
    the module of this name as its `__main__`.
    """

    loader = origin = submodule_search_locations = cached = None
    has_location = False
    is_sealed = False

    def __init__(self, blob: bytes) -> None:
        self._blob = blob
        self._file: int | None = None
        self._path = ""

    @property
    def name(self) -> str:
        """A module that has what this script has; see `spawned`."""
        if self._file is None:
            if self.is_sealed:
                # The folder of a sandbox ends with it.
                self._file, self._path = tempfile.mkstemp(prefix="function-")
            else:
                self._file = os.memfd_create("function")
            with open(self._file, "wb", closefd=False) as file:
                file.write(self._blob)
        os.environ[SCRIPT_VARIABLE] = self._path or f"/proc/{os.getpid()}/fd/{self._file}"
        return SPAWNED

    @property
    def parent(self) -> str:
        """The package of the script."""
        return str(sys.modules["__main__"].__package__ or "")


def _prefer(bundle: str) -> None:
    """Have imports find a bundle's modules first, also where this process has imported others of the same name."""
    if bundle in sys.path:
        return
    sys.path.insert(0, bundle)
    _bundles.append(bundle + os.sep)
    for entry in os.scandir(bundle):
        name = entry.name.partition(".")[0]
        if name == "__main__":
            continue
        if entry.is_file() or os.path.exists(os.path.join(entry.path, "__init__.py")):
            for loaded in [found for found in sys.modules if found == name or found.startswith(f"{name}.")]:
                del sys.modules[loaded]
