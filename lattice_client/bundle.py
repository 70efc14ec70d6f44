"""Owns the bundle: the user's own modules that a function needs and no worker has.

Rule: what is found by reading import statements below the script's folder travels; installed packages do not.
"""

import ast
import functools
import hashlib
import io
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lattice.v1 import task_pb2

from lattice_client.errors import TaskDefinitionError

LIMIT_BYTES = 32 * 1024 * 1024
OWN_PACKAGES = frozenset({"lattice", "lattice_client", "lattice_server", "lattice_worker"})
INSTALLED = tuple(
    str(Path(path).resolve()) for path in {sysconfig.get_path(n) for n in ("stdlib", "purelib", "platlib")}
)
_files: dict[str, tuple[tuple[str, int, int], ...]] = {}
EPOCH = (1980, 1, 1, 0, 0, 0)


def bundle_for(function: Callable[..., Any]) -> task_pb2.CodeBundle | None:
    """Return the bundle `function` needs, or None. Raises TaskDefinitionError when it is over 32 MiB."""
    module = sys.modules.get(function.__module__)
    source = getattr(module, "__file__", None)
    if source is None:
        return None
    start = Path(source).resolve()
    root = _root(start, function.__module__)
    if _is_installed(start):
        return None
    files: dict[str, Path] = {}
    if function.__module__ != "__main__" and function.__module__.split(".")[0] not in OWN_PACKAGES:
        files.update(_files_of(root, function.__module__.split(".")[0]))
    pending = [start]
    seen: set[Path] = set()
    named: set[str] = set()
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in _imports(path, _state(path)):
            if name in named:
                continue
            named.add(name)
            found = _files_of(root, name)
            files.update(found)
            pending.extend(found.values())
    return _zip(tuple((name, files[name], _state(files[name])) for name in sorted(files))) if files else None


def _state(path: Path) -> tuple[int, int]:
    """Return what changes with a file's content: a long session may edit what it sent before."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _root(start: Path, module: str) -> Path:
    depth = 0 if module == "__main__" else module.count(".") + (start.name == "__init__.py")
    return start.parents[depth]


def _is_installed(path: Path) -> bool:
    return str(path).startswith(INSTALLED) or "site-packages" in path.parts


@functools.lru_cache(maxsize=4096)
def _imports(path: Path, state: tuple[int, int]) -> tuple[str, ...]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ()
    return tuple(dict.fromkeys(_imported(tree)))


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def _files_of(root: Path, name: str) -> dict[str, Path]:
    if name in OWN_PACKAGES or name in sys.stdlib_module_names:
        return {}
    single, package = root / f"{name}.py", root / name
    if single.is_file():
        return {single.name: single}
    if (package / "__init__.py").is_file() and not _is_installed(package):
        return {str(path.relative_to(root)): path for path in package.rglob("*.py")}
    return {}


@functools.lru_cache(maxsize=16)
def _zip(files: tuple[tuple[str, Path, tuple[int, int]], ...]) -> task_pb2.CodeBundle:
    total = sum(size for _, _, (_, size) in files)
    if total > LIMIT_BYTES:
        raise TaskDefinitionError(
            f"the modules beside your script are {total} bytes, the limit is {LIMIT_BYTES}; "
            "install the large ones as packages where the workers run"
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path, _ in files:
            archive.writestr(zipfile.ZipInfo(name, EPOCH), path.read_bytes())
    data = buffer.getvalue()
    bundle = task_pb2.CodeBundle(digest=f"sha256:{hashlib.sha256(data).hexdigest()}", zip=data)
    _files[bundle.digest] = tuple((str(path), *state) for _, path, state in files)
    return bundle


def files_in(bundle: task_pb2.CodeBundle | None) -> tuple[tuple[str, int, int], ...]:
    """Return the files a bundle was made of: each one's path, time in nanoseconds, and size."""
    return _files.get(bundle.digest, ()) if bundle is not None else ()
