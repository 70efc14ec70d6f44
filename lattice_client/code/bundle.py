"""Owns the bundle: the user's own modules that a function needs and no worker has.

Rule: a module that is imported from outside the Python installation is sent with all files of its package; every
module or file that is left out has a reason.
"""

import fnmatch
import functools
import hashlib
import io
import os
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType, ModuleType
from typing import NamedTuple

from lattice.v1 import task_pb2

from lattice_client.code import modules
from lattice_client.code.freshness import FileState
from lattice_client.code.imports import imports_in, imports_of
from lattice_client.code.modules import File
from lattice_client.errors import TaskDefinitionError

MIB = 1024 * 1024
LIMIT_BYTES = 32 * MIB
# The limit of a file that is not code, unless the user named it.
DATA_LIMIT_BYTES = 4 * MIB
# The bundles that stay in memory while their files do not change.
MAX_BUNDLES = 16
EPOCH = (1980, 1, 1, 0, 0, 0)

Item = str | os.PathLike[str] | ModuleType


@dataclass(frozen=True, slots=True)
class Choice:
    """The modules and paths that the user adds, and the patterns that the user excludes."""

    added: Sequence[Item] = ()
    exclude: Sequence[str] = ()


@dataclass(slots=True)
class Found:
    """A search for files: those found, by name in the archive; the reasons of those left out; the modules to search."""

    choice: Choice
    files: dict[str, File] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    pending: list[str] = field(default_factory=list)

    def excludes(self, path: str) -> bool:
        """Whether the user excluded a file or a folder, by its path or as a module; its reason is noted then."""
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for pattern in self.choice.exclude:
            if fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(module, pattern):
                # A folder without a suffix may be a module: the search does not enter an excluded folder.
                is_data = "." in os.path.basename(path) and not path.endswith(".py")
                self.left_out[path if is_data else module] = f"is left out by exclude=[{pattern!r}]"
                return True
        return False

    def take(self, name: str, files: dict[str, File], *, is_named: bool = False) -> None:
        """Add files and the modules they import. `is_named`: the user named the module or the path."""
        kept: dict[str, File] = {}
        for path, file in files.items():
            if not is_named and not modules.is_code(path) and file.size > DATA_LIMIT_BYTES:
                self.left_out[path] = f"{_too_large(file.size, DATA_LIMIT_BYTES)}; name it in modules=[...]"
            else:
                kept[path] = file
        size = sum(file.size for file in kept.values())
        if size > LIMIT_BYTES and not is_named:
            text = "install it on the worker, or leave files of it out with exclude=[...]"
            self.left_out[name] = f"{_too_large(size, LIMIT_BYTES)}; {text}"
            return
        self.files |= kept
        for path, file in kept.items():
            if path.endswith(".py"):
                self.pending += _imports_of_file(file, name)


class Bundle(NamedTuple):
    """The files that are sent with a function. `files` are the states of the files that `message` was made of."""

    message: task_pb2.CodeBundle
    files: tuple[FileState, ...]


def bundle_for(
    needed: Iterable[str], codes: Iterable[CodeType] = (), choice: Choice | None = None
) -> tuple[Bundle | None, dict[str, str]]:
    """Return the bundle of a function, None without files, and the reasons of the modules and files that are left out.

    Args:
        needed: the modules that unpickling the function imports.
        codes: code within the pickle, whose imports are needed too.
        choice: the modules and paths that the user adds, and the patterns that the user excludes.

    Raises:
        TaskDefinitionError: an added module or path does not exist, or the files have over 32 MiB.
    """
    found = Found(choice or Choice())
    named = {_add(item, found) for item in found.choice.added}
    found.pending += [*named, *needed, *_imports_of_script(), *(name for code in codes for name in imports_of(code))]
    seen = {""}
    while found.pending:
        name = found.pending.pop().partition(".")[0]
        if name not in seen:
            seen.add(name)
            files = modules.files_of(name, is_named=name in named, is_excluded=found.excludes)
            if isinstance(files, dict):
                found.take(name, files, is_named=name in named)
            elif files:
                found.left_out[name] = files
    bundle = _zip(tuple(sorted(found.files.items()))) if found.files else None
    return bundle, dict(sorted(found.left_out.items()))


def _add(item: Item, found: Found) -> str:
    """Add the files of a path; for a module return its name."""
    if isinstance(item, ModuleType):
        return item.__name__.partition(".")[0]
    text = os.fspath(item)
    script = getattr(sys.modules["__main__"], "__file__", None)
    path = os.path.join(os.path.dirname(os.path.abspath(script)) if script else os.getcwd(), text)
    if os.path.exists(path):
        path = os.path.realpath(path)
        prefix = _name_of(path)
        is_excluded = any(map(found.excludes, modules.paths_to(prefix)))
        tree = () if is_excluded else modules.tree(path, prefix, found.excludes)
        found.take(prefix, {os.path.normpath(os.path.join(prefix, below)): file for below, file in tree}, is_named=True)
        return ""
    name = text.partition(".")[0]
    if not modules.files_of(name, is_named=True):
        where = os.path.dirname(path) or "/"
        raise TaskDefinitionError(
            f"modules=[{text!r}]: there is no module of that name, and no file or folder in {where}"
        )
    return name


def _name_of(path: str) -> str:
    """Return a path's name in the archive: relative to its entry of `sys.path`, or else its last part."""
    roots = {os.path.realpath(entry) for entry in sys.path if not modules.is_installed(entry)}
    within = [root for root in roots if path == root or path.startswith(f"{root.rstrip(os.sep)}{os.sep}")]
    return os.path.relpath(path, max(within, key=len)) if within else os.path.basename(path)


def _imports_of_script() -> Iterator[str]:
    """Yield the modules that the script imports: values it sends may be instances of their classes."""
    script = sys.modules["__main__"]
    if (file := modules.file_of_script()) is not None:
        yield from _imports_of_file(file, getattr(script, "__package__", None) or "")
    elif not hasattr(script, "__file__"):  # an interactive session
        for value in list(vars(script).values()):
            owner = value if isinstance(value, FunctionType | type) else type(value)
            yield value.__name__ if isinstance(value, ModuleType) else str(owner.__module__)


@functools.lru_cache(maxsize=4096)
def _imports_of_file(file: File, package: str) -> tuple[str, ...]:
    try:
        return imports_in(file.read(), package)
    except OSError:
        return ()


def _too_large(size: int, limit: int) -> str:
    return f"has {size / MIB:.1f} MiB, above the limit of {limit // MIB} MiB"


@functools.lru_cache(maxsize=MAX_BUNDLES)
def _zip(files: tuple[tuple[str, File], ...]) -> Bundle:
    total = sum(file.size for _, file in files)
    if total > LIMIT_BYTES:
        largest = ", ".join(name for name, _ in sorted(files, key=lambda entry: -entry[1].size)[:3])
        raise TaskDefinitionError(
            f"the modules and files of your own that the task needs have {total} bytes, the limit is {LIMIT_BYTES}; "
            f"the largest: {largest}; leave unused files out with exclude=[...], or install them on the workers"
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in files:
            archive.writestr(zipfile.ZipInfo(name, EPOCH), file.read(), zipfile.ZIP_DEFLATED)
    data = buffer.getvalue()
    message = task_pb2.CodeBundle(digest=f"sha256:{hashlib.sha256(data).hexdigest()}", zip=data)
    # For a member of a zip archive, the size of the archive: both change together.
    sizes = {file.path: os.path.getsize(file.path) if file.member else file.size for _, file in files}
    return Bundle(message, tuple({(file.path, file.changed_ns, sizes[file.path]) for _, file in files}))
