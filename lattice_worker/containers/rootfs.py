"""The files of the sandbox image: this machine's Python, the runner, chosen packages, and the libraries of all these.

Rule: nothing is downloaded, and only the files listed here are taken from this machine.
"""

import hashlib
import importlib.metadata
import io
import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement

from lattice_worker.containers.spec import UID

PREFIX = "/opt/lattice"
PYTHON = f"{PREFIX}/bin/python3"
FOLDER = f"{PREFIX}/lib/python{sys.version_info.major}.{sys.version_info.minor}"
SITE = f"{FOLDER}/site-packages"
# Parts of the standard library that no task imports, and the machine's own packages.
LEFT_OUT = frozenset({"site-packages", "dist-packages", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo"})
LEFT_OUT |= {"test", "tests", "__pycache__"}
PROGRAMS = (
    *("sh", "cat", "cp", "date", "echo", "env", "grep", "head", "ls", "mkdir", "mv", "rm", "sed", "sleep", "sort"),
    *("tail", "true", "uname"),
)
RUNNER_PACKAGES = ("cloudpickle", "orjson")
# Libraries that others load by name when they are needed.
LOADED_LIBRARIES = ("libgcc_s.so.1", "libstdc++.so.6", "libgomp.so.1")
# Where the loader looks by itself; libraries of other places are put into one of these.
USUAL_LIBRARIES = ("/lib/", "/lib64/", "/usr/lib/", "/usr/lib64/")
FILES = ("/etc/ssl/openssl.cnf", "/etc/localtime", "/etc/mime.types", "/etc/services", "/etc/protocols")
CERTIFICATES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
ZONES = "/usr/share/zoneinfo"
TEXTS = {
    "/etc/passwd": f"root:x:0:0::/nonexistent:/bin/false\ntask:x:{UID}:{UID}::/tmp:/bin/sh\n",
    "/etc/group": f"root:x:0:\ntask:x:{UID}:\n",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}
FOLDERS = ("/dev", "/proc", "/sys", "/lattice")  # On which others are mounted.
LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x")


class Rootfs:
    """Writes the files into a tar archive, below a folder of it."""

    def __init__(self, archive: tarfile.TarFile, below: str) -> None:
        self._archive, self._below = archive, below
        self._written: set[str] = set()
        self._binaries: list[str] = []

    def write_runner(self) -> None:
        """Write this package."""
        self._tree(str(Path(__file__).parent.parent), f"{SITE}/lattice_worker", frozenset({"__pycache__"}))

    def write_machine(self, packages: Iterable[str]) -> None:
        """Write all other files, with these packages. Raises PackageNotFoundError."""
        self._folder("/tmp", 0o1777)
        for path in FOLDERS:
            self._folder(path)
        for path, text in TEXTS.items():
            self.write_text(path, text)
        self._file(os.path.realpath(sys.executable), f"{PYTHON}.{sys.version_info.minor}")
        self._link(PYTHON, f"python3.{sys.version_info.minor}")
        self._link(f"{PREFIX}/bin/python", "python3")
        self._tree(sysconfig.get_path("stdlib"), FOLDER, LEFT_OUT)
        for name in sorted(packages):
            self._package(importlib.metadata.distribution(name))
        for program in PROGRAMS:
            if (found := shutil.which(program)) is not None:
                self._file(os.path.realpath(found), f"/bin/{program}")
        for path in (*FILES, *CERTIFICATES):
            if os.path.exists(path):
                self._file(os.path.realpath(path), path)
        if os.path.isdir(ZONES):
            self._tree(ZONES, ZONES, frozenset({"posix", "right"}))
        self._libraries()

    def _package(self, distribution: importlib.metadata.Distribution) -> None:
        for file in distribution.files or ():
            path = str(file)
            if path.startswith("..") or "__pycache__" in file.parts:
                continue
            found = str(distribution.locate_file(file))
            if os.path.isfile(found):
                self._file(found, f"{SITE}/{path}")

    def _tree(self, source: str, target: str, left_out: frozenset[str]) -> None:
        for folder, names, files in os.walk(source):
            names[:] = sorted(set(names) - left_out)
            below = os.path.relpath(folder, source)
            for name in sorted(files):
                if not name.endswith((".a", ".pyc")):
                    self._file(os.path.join(folder, name), os.path.normpath(f"{target}/{below}/{name}"))

    def _file(self, source: str, target: str) -> None:
        if target in self._written or not os.path.exists(source):
            return
        info = self._info(target)
        with open(source, "rb") as file:
            status = os.fstat(file.fileno())
            info.size, info.mtime = status.st_size, int(status.st_mtime)
            start = file.read(4)
            # Every user may read it; a program may be run, but is never setuid.
            info.mode = 0o755 if status.st_mode & 0o111 or start == b"\x7fELF" else 0o644
            file.seek(0)
            self._archive.addfile(info, file)
        if start == b"\x7fELF":
            self._binaries.append(source)
        if source.endswith(".py"):
            self._compiled(source, target)

    def _compiled(self, source: str, target: str) -> None:
        """Write the byte code: a process in the image cannot keep it."""
        tag = sys.implementation.cache_tag
        folder, name = os.path.split(target)
        path = f"{folder}/__pycache__/{name[:-3]}.{tag}.pyc"
        known = Path(source).parent / "__pycache__" / f"{Path(source).stem}.{tag}.pyc"
        if known.exists() and known.stat().st_mtime >= os.stat(source).st_mtime:
            self._bytes(path, known.read_bytes())
            return
        with tempfile.NamedTemporaryFile() as made:
            try:
                mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
                py_compile.compile(source, made.name, target, doraise=True, invalidation_mode=mode)
            except py_compile.PyCompileError:
                return  # A template, or code for another version.
            self._bytes(path, Path(made.name).read_bytes())

    def _libraries(self) -> None:
        for path in sorted({*_needed_by(self._binaries), *_loaded()}):
            # A library inside a package was written with the package.
            if f"{os.sep}site-packages{os.sep}" not in path:
                is_usual = path.startswith(USUAL_LIBRARIES)
                self._file(os.path.realpath(path), path if is_usual else f"/usr/lib/{os.path.basename(path)}")

    def write_text(self, target: str, text: str) -> None:
        """Write one file."""
        self._bytes(target, text.encode())

    def _bytes(self, target: str, data: bytes) -> None:
        info = self._info(target)
        info.size = len(data)
        self._archive.addfile(info, io.BytesIO(data))

    def _link(self, target: str, to: str) -> None:
        info = self._info(target)
        info.type, info.linkname = tarfile.SYMTYPE, to
        self._archive.addfile(info)

    def _folder(self, target: str, mode: int = 0o755) -> None:
        info = self._info(target)
        info.type, info.mode = tarfile.DIRTYPE, mode
        self._archive.addfile(info)

    def _info(self, target: str) -> tarfile.TarInfo:
        self._written.add(target)
        info = tarfile.TarInfo(f"{self._below}{target}")
        info.mode = 0o644
        return info


def machine_digest(packages: Iterable[str]) -> str:
    """Return what names all files but the runner's. Raises PackageNotFoundError."""
    versions = [f"{name}=={importlib.metadata.version(name)}" for name in sorted(packages)]
    return hashlib.sha256("\n".join([sys.version, *versions, Path(__file__).read_text()]).encode()).hexdigest()[:32]


def with_needed(names: Iterable[str]) -> set[str]:
    """Return packages with all those they need. Raises PackageNotFoundError."""
    found: set[str] = set()
    pending = [(name, frozenset[str]()) for name in names]
    while pending:
        name, extras = pending.pop()
        name = re.sub(r"[-_.]+", "-", name).lower()
        if name in found and not extras:
            continue
        found.add(name)
        for text in importlib.metadata.requires(name) or ():
            needed = Requirement(text)
            applies = [needed.marker is None or needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)]
            if any(applies) and needed.name.lower() not in found:
                pending.append((needed.name, frozenset(needed.extras)))
    return found


def _needed_by(binaries: list[str]) -> Iterator[str]:
    """Yield the paths of the libraries that programs and libraries need."""
    if not binaries:
        return
    # For a static program it says so and ends with an error.
    said = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False).stdout
    for line in said.splitlines():
        if (match := LIBRARY.search(line)) is not None:
            yield match[1]


def _loaded() -> Iterator[str]:
    said = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    for line in said.splitlines():
        name, _, path = line.strip().partition(" => ")
        if name.split(" ")[0] in LOADED_LIBRARIES and "x32" not in name and not path.startswith("/lib32"):
            yield path
