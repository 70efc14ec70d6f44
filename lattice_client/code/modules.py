"""Owns finding the files of a module as this process imports it. Rule: installed modules are not sent.

A module is found in `sys.modules`, and by the finders of `sys.path` if it is not imported yet; its files may lie in
folders and in zip archives.
"""

import functools
import importlib.util
import os
import stat
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

from lattice_client.errors import TaskDefinitionError

# Workers have these packages, and create the script's `__main__` module themselves.
NEVER_SENT = frozenset({"lattice", "lattice_client", "lattice_server", "lattice_worker", "__main__", "__mp_main__"})
PATHS = ("stdlib", "platstdlib", "purelib", "platlib")
INSTALLED = tuple({f"{os.path.realpath(path)}{os.sep}" for name in PATHS if (path := sysconfig.get_path(name))})
INSTALLED_FOLDERS = frozenset({"site-packages", "dist-packages"})
# Folders of tools.
IGNORED_FOLDERS = frozenset({"__pycache__", "node_modules"})
MAX_FILES = 10_000
# Whether the user excluded a path.
IsExcluded = Callable[[str], bool]
INSTALLED_REASON = "is installed on the client, so it is expected on the worker; install it there"


@dataclass(frozen=True, slots=True)
class File:
    """A file on disk, or a member of a zip archive, at one modification time and size."""

    path: str
    member: str
    changed_ns: int
    size: int

    def read(self) -> bytes:
        """Return the content. Raises OSError."""
        if not self.member:
            return Path(self.path).read_bytes()
        with zipfile.ZipFile(self.path) as archive:
            return archive.read(self.member)


def nothing(path: str) -> bool:
    """Return False: nothing is excluded."""
    return False


def files_of(name: str, *, is_named: bool = False, is_excluded: IsExcluded = nothing) -> dict[str, File] | str:
    """Return the files of a top-level module by their names relative to `sys.path`, or the reason to leave it out.

    The reason is empty for a module of the standard library, and for one that does not exist. For a module that the
    user named, by `is_named`, the files are returned even when it is installed. Excluded files are left
    out, as in `tree`.
    """
    module = sys.modules.get(name)
    spec: ModuleSpec | None = getattr(module, "__spec__", None)
    if module is None:
        spec = _spec(name)
    if name in NEVER_SENT or (spec is not None and spec.origin in {"built-in", "frozen"}):
        return ""
    folders = list(getattr(module, "__path__", None) or (spec and spec.submodule_search_locations) or ())
    origin = getattr(module, "__file__", None) or (spec and spec.origin)
    if not folders and not origin:
        return ""
    own = [folder for folder in folders if is_named or not is_installed(folder)]
    if not is_named and (is_installed(origin) if origin else not own):
        return "" if name in sys.stdlib_module_names else INSTALLED_REASON
    if is_excluded(name):
        return {}
    found = {f"{name}/{below}": file for folder in own for below, file in tree(folder, name, is_excluded)}
    if not folders and origin:
        suffix = ".py" if origin.endswith(".py") else os.path.basename(origin).removeprefix(name)
        found = {f"{name}{suffix}": file for _, file in tree(origin) if not is_excluded(f"{name}{suffix}")}
    # Python imports a folder without code as a namespace package.
    return found if any(map(is_code, found)) else ""


def is_code(name: str) -> bool:
    """Whether a file of this name is a module."""
    return name.endswith((".py", ".so", ".pyd"))


@functools.lru_cache(maxsize=4096)
def is_installed(path: str) -> bool:
    """Whether a file belongs to an installation of Python."""
    return os.path.realpath(path).startswith(INSTALLED) or not INSTALLED_FOLDERS.isdisjoint(Path(path).parts)


def tree(path: str, name: str = "", is_excluded: IsExcluded = nothing) -> Iterator[tuple[str, File]]:
    """Yield the files at and below a path, each with its path below it. Raises TaskDefinitionError over 10,000.

    `name` is the path's name in the archive. Files and folders below it that are excluded by their names in the archive
    are left out; the content of these folders is not looked at.
    """
    archive, inside = _archive(path)

    def is_left_out(below: str) -> bool:
        return is_excluded(f"{name}/{below}")

    found = _members(archive, inside, is_left_out) if archive else _below(path, is_left_out)
    for count, (below, file) in enumerate(found):
        if count == MAX_FILES:
            text = f"{path} contains over {MAX_FILES} files, too many to send"
            raise TaskDefinitionError(f"{text}; leave it out with exclude=[...], or install it where the workers run")
        yield below, file


def file_of_script() -> File | None:
    """Return the file of the script; None without one, and for an installed program."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    if path is None or is_installed(path):
        return None
    return dict(tree(os.path.abspath(path))).get("")


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except Exception:  # a finder may be code of the user
        return None


def _state(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _below(path: str, is_left_out: IsExcluded) -> Iterator[tuple[str, File]]:
    if (state := _state(path)) is not None and os.path.isfile(path):
        yield "", File(path, "", state.st_mtime_ns, state.st_size)
        return
    seen: set[str] = set()
    for folder, folders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a parent folder
            folders.clear()
            continue
        seen.add(real)
        below = os.path.relpath(folder, path)
        prefix = "" if below == os.curdir else f"{below}{os.sep}"
        wanted = [f for f in folders if _is_wanted(f) and not os.path.exists(f"{folder}/{f}/pyvenv.cfg")]
        folders[:] = sorted(f for f in wanted if not is_left_out(prefix + f))
        for name in sorted(filter(_is_wanted, names)):
            full = os.path.join(folder, name)
            if is_left_out(prefix + name):
                continue
            if (state := _state(full)) is not None and stat.S_ISREG(state.st_mode):
                yield prefix + name, File(full, "", state.st_mtime_ns, state.st_size)


def _is_wanted(name: str) -> bool:
    return not name.startswith(".") and name not in IGNORED_FOLDERS and not name.endswith((".pyc", ".pyo"))


def paths_to(path: str) -> Iterator[str]:
    """Yield the folders that contain a path, from the outermost, and the path."""
    parts = path.split("/")
    return ("/".join(parts[:end]) for end in range(1, len(parts) + 1))


def _archive(path: str) -> tuple[str, str]:
    """Return the zip archive that contains a path, and the path inside it."""
    if os.path.exists(path):
        return "", ""
    for parent in map(str, Path(path).parents):
        if os.path.isfile(parent):
            return (parent, path[len(parent) + 1 :]) if zipfile.is_zipfile(parent) else ("", "")
    return "", ""


def _members(archive: str, inside: str, is_left_out: IsExcluded) -> Iterator[tuple[str, File]]:
    changed_ns = os.stat(archive).st_mtime_ns
    for name, size in _index(archive, changed_ns):
        below = "" if name == inside else name.removeprefix(f"{inside}/")
        if below != name and all(map(_is_wanted, below.split("/"))) and not any(map(is_left_out, paths_to(below))):
            yield below, File(archive, name, changed_ns, size)


@functools.lru_cache(maxsize=16)
def _index(archive: str, changed_ns: int) -> list[tuple[str, int]]:
    with zipfile.ZipFile(archive) as opened:
        return sorted((info.filename, info.file_size) for info in opened.infolist() if not info.is_dir())
