"""Owns the bundle: the user's own modules that a function needs and no worker has.

Rule: a module that this process has, or would import, from elsewhere than its installation travels with all files of
its package; for each module or file that is left out the reason is kept.
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

from lattice.v1 import task_pb2

from lattice_client.code import modules
from lattice_client.code.imports import imports_in, imports_of
from lattice_client.code.modules import File
from lattice_client.errors import TaskDefinitionError

MIB = 1024 * 1024
LIMIT_BYTES = 32 * MIB
# Of a file that is not code, unless it is named.
DATA_LIMIT_BYTES = 4 * MIB
_files: dict[str, tuple[tuple[str, int, int], ...]] = {}
EPOCH = (1980, 1, 1, 0, 0, 0)

Item = str | os.PathLike[str] | ModuleType


@dataclass(frozen=True, slots=True)
class Choice:
    """What the user adds, modules and paths, and the patterns of what to leave out."""

    added: Sequence[Item] = ()
    exclude: Sequence[str] = ()


@dataclass(slots=True)
class Found:
    """Files that travel, by their names in the archive; why others do not; and the modules to look at next."""

    choice: Choice
    files: dict[str, File] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    pending: list[str] = field(default_factory=list)

    def take(self, name: str, files: dict[str, File], *, is_named: bool = False) -> None:
        """Add the files of a module, or of a path that is `is_named` by the user, and what they import."""
        kept: dict[str, File] = {}
        for path, file in files.items():
            if (excluded := _excluded_by(path, self.choice.exclude)) is not None:
                prefix, pattern = excluded
                self.left_out[prefix] = f"is left out by exclude=[{pattern!r}]"
            elif not is_named and not modules.is_code(path) and file.size > DATA_LIMIT_BYTES:
                self.left_out[path] = f"{_too_large(file.size, DATA_LIMIT_BYTES)}; name it in modules=[...]"
            else:
                kept[path] = file
        size = sum(file.size for file in kept.values())
        if size > LIMIT_BYTES and not is_named:
            text = "install it on the worker, or leave parts of it out with exclude=[...]"
            self.left_out[name] = f"{_too_large(size, LIMIT_BYTES)}; {text}"
            return
        self.files |= kept
        for path, file in kept.items():
            if path.endswith(".py"):
                self.pending += _imports_of_file(file, name)


def bundle_for(
    needed: Iterable[str], codes: Iterable[CodeType] = (), choice: Choice | None = None
) -> tuple[task_pb2.CodeBundle | None, dict[str, str]]:
    """Return the bundle of a function, or None, and the reasons of the modules and files that are left out.

    Args:
        needed: the modules that are imported to load the function.
        codes: code that travels with it, whose imports count too.
        choice: what the user adds and leaves out.

    Raises:
        TaskDefinitionError: what is added does not exist, or all is over 32 MiB.
    """
    found = Found(choice or Choice())
    named = {_add(item, found) for item in found.choice.added}
    found.pending += [*named, *needed, *_imports_of_script(), *(name for code in codes for name in imports_of(code))]
    seen = {""}
    while found.pending:
        name = found.pending.pop().partition(".")[0]
        if name not in seen:
            seen.add(name)
            files = modules.files_of(name, is_named=name in named)
            if isinstance(files, dict):
                found.take(name, files, is_named=name in named)
            elif files:
                found.left_out[name] = files
    bundle = _zip(tuple(sorted(found.files.items()))) if found.files else None
    return bundle, dict(sorted(found.left_out.items()))


def _add(item: Item, found: Found) -> str:
    """Add the files of a path; return the name of a module."""
    if isinstance(item, ModuleType):
        return item.__name__.partition(".")[0]
    text = os.fspath(item)
    script = getattr(sys.modules["__main__"], "__file__", None)
    path = os.path.join(os.path.dirname(os.path.abspath(script)) if script else os.getcwd(), text)
    if os.path.exists(path):
        path = os.path.realpath(path)
        prefix = _name_of(path)
        files = {os.path.normpath(os.path.join(prefix, below)): file for below, file in modules.tree(path)}
        found.take(prefix, files, is_named=True)
        return ""
    name = text.partition(".")[0]
    if not modules.files_of(name, is_named=True):
        where = os.path.dirname(path) or "/"
        raise TaskDefinitionError(
            f"modules=[{text!r}]: there is no module of that name, and no file or folder in {where}"
        )
    return name


def _name_of(path: str) -> str:
    """Return a path's name in the archive: below the entry of `sys.path` in which it is, or else its last part."""
    roots = {os.path.realpath(entry) for entry in sys.path if not modules.is_installed(entry)}
    within = [root for root in roots if path == root or path.startswith(f"{root.rstrip(os.sep)}{os.sep}")]
    return os.path.relpath(path, max(within, key=len)) if within else os.path.basename(path)


def _imports_of_script() -> Iterator[str]:
    """Yield what the script imports: values that it sends may be of classes from there."""
    script = sys.modules["__main__"]
    if (file := modules.file_of_script()) is not None:
        yield from _imports_of_file(file, getattr(script, "__package__", None) or "")
    elif not hasattr(script, "__file__"):  # it was typed in
        for value in list(vars(script).values()):
            owner = value if isinstance(value, FunctionType | type) else type(value)
            yield value.__name__ if isinstance(value, ModuleType) else str(owner.__module__)


@functools.lru_cache(maxsize=4096)
def _imports_of_file(file: File, package: str) -> tuple[str, ...]:
    try:
        return imports_in(file.read(), package)
    except OSError:
        return ()


def _excluded_by(path: str, patterns: Sequence[str]) -> tuple[str, str] | None:
    """Return the module or file that a pattern leaves out, a package or folder of `path` or the path itself."""
    parts = path.split("/")
    for end in range(1, len(parts) + 1):
        prefix = "/".join(parts[:end])
        module = prefix.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for pattern in patterns:
            if fnmatch.fnmatchcase(prefix, pattern) or fnmatch.fnmatchcase(module, pattern):
                return (module if path.endswith(".py") else prefix), pattern
    return None


def _too_large(size: int, limit: int) -> str:
    return f"has {size / MIB:.1f} MiB, above the limit of {limit // MIB} MiB"


@functools.lru_cache(maxsize=16)
def _zip(files: tuple[tuple[str, File], ...]) -> task_pb2.CodeBundle:
    total = sum(file.size for _, file in files)
    if total > LIMIT_BYTES:
        largest = ", ".join(name for name, _ in sorted(files, key=lambda entry: -entry[1].size)[:3])
        raise TaskDefinitionError(
            f"the modules and files of your own that the task needs have {total} bytes, the limit is {LIMIT_BYTES}; "
            f"the largest: {largest}; leave out what it does not need with exclude=[...], or install it on the workers"
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in files:
            archive.writestr(zipfile.ZipInfo(name, EPOCH), file.read(), zipfile.ZIP_DEFLATED)
    data = buffer.getvalue()
    bundle = task_pb2.CodeBundle(digest=f"sha256:{hashlib.sha256(data).hexdigest()}", zip=data)
    # Of an archive its own size: its members change with it.
    sizes = {file.path: os.path.getsize(file.path) if file.member else file.size for _, file in files}
    _files[bundle.digest] = tuple({(file.path, file.changed_ns, sizes[file.path]) for _, file in files})
    return bundle


def files_in(bundle: task_pb2.CodeBundle | None) -> tuple[tuple[str, int, int], ...]:
    """Return the files a bundle was made of: each one's path, time in nanoseconds, and size."""
    return _files.get(bundle.digest, ()) if bundle is not None else ()
