"""A disk that keeps only synced data when the power is cut.

SQLite writes through a VFS that remembers the content of each file at its last sync. Values in files are watched by
`os.fsync`: the content counts once the file is synced, its name once the folder is.
"""

import os
import shutil
import threading
from pathlib import Path
from typing import Any
from uuid import uuid4

import apsw
import pytest


class LossyDisk:
    """Remembers the synced data in the folder of one journal."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.fails_to_sync = False
        self._lock = threading.Lock()
        self._databases: dict[str, bytes] = {}
        self._contents: dict[int, bytes] = {}  # Of values, by inode.
        self._values: dict[str, bytes] = {}
        self._fsync = os.fsync
        self._vfs = _Vfs(self)
        patch.setattr(os, "fsync", self._sync)

    def connect(self, path: Path, is_reader: bool) -> Any:
        """See `SqliteSettings.connect`."""
        flags = apsw.SQLITE_OPEN_READONLY if is_reader else apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_CREATE
        return apsw.Connection(str(path), flags, vfs=self._vfs.name)

    def cut_power(self, into: Path) -> None:
        """Write the data that is synced at this moment into another folder."""
        with self._lock:
            databases, values = dict(self._databases), dict(self._values)
        shutil.rmtree(into, ignore_errors=True)
        (into / "values").mkdir(parents=True)
        for name, content in databases.items():
            (into / name).write_bytes(content)
        for name, content in values.items():
            (into / "values" / name).write_bytes(content)

    def sync_database(self, name: str) -> None:
        """Note the content of a file of SQLite."""
        if self.fails_to_sync:
            error = apsw.IOError("the disk is gone")
            error.extendedresult = apsw.SQLITE_IOERR_FSYNC
            raise error
        content = Path(name).read_bytes()
        with self._lock:
            self._databases[Path(name).name] = content

    def delete_database(self, name: str) -> None:
        """Forget a file of SQLite."""
        with self._lock:
            self._databases.pop(Path(name).name, None)

    def _sync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path == self.folder / "values":
            values = {entry.name: self._contents.get(entry.inode(), b"") for entry in os.scandir(path)}
            with self._lock:
                self._values = values
        elif path.parent == self.folder / "values":
            self._contents[os.fstat(descriptor).st_ino] = path.read_bytes()
        else:
            self._fsync(descriptor)


class _Vfs(apsw.VFS):
    def __init__(self, disk: LossyDisk) -> None:
        self.name = f"lossy-{uuid4().hex}"
        self.disk = disk
        super().__init__(self.name, "")

    def xOpen(self, name: Any, flags: list[int]) -> Any:
        return _File(self.disk, name, flags)

    def xDelete(self, name: str, syncdir: bool) -> None:
        super().xDelete(name, syncdir)
        self.disk.delete_database(name)


class _File(apsw.VFSFile):
    def __init__(self, disk: LossyDisk, name: Any, flags: list[int]) -> None:
        super().__init__("", name, flags)
        self._disk = disk
        self._name = name.filename() if isinstance(name, apsw.URIFilename) else name

    def xSync(self, flags: int) -> None:
        super().xSync(flags)
        if self._name:
            self._disk.sync_database(self._name)
