"""Large values, as files of the node's store, and the encoding of an invocation's outputs."""

import contextlib
import fcntl
import io
import mmap
import os
import uuid
from typing import Any

from lattice_worker.runner.text import message_of, type_name
from lattice_worker.runner.values import PayloadError, encode_value

SPARES = "spares"
MIN_SPARE_BYTES = 1024 * 1024


class Encoder:
    """Encodes the outputs of one invocation: small ones into the frame, as `blobs`; large ones into files of the
    runner's folder, which the frame lists as `made` and the agent moves into the store."""

    def __init__(self, header: dict[str, Any]) -> None:
        self._folder = header["folder"]
        self._spares = os.path.join(header["store"], SPARES)
        self._inline_limit = header["inline_limit"]
        self.blobs: list[bytes] = []
        self.made: list[str] = []

    def take_back(self, blobs: int = 0, made: int = 0) -> None:
        """Forget all but so many blobs and artifacts."""
        for artifact in self.made[made:]:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self._folder, artifact))
        del self.blobs[blobs:], self.made[made:]

    def encode(self, value: Any) -> dict[str, Any]:
        """Return a reference to the encoded value."""
        try:
            media_type, parts = encode_value(value)
        except MemoryError:
            raise
        except Exception as error:
            what = f"an output of type {type_name(type(value))} cannot be pickled"
            raise PayloadError(f"{what}: {message_of(error)}") from error
        size = sum(len(part) for part in parts)
        if size <= self._inline_limit:
            self.blobs.append(b"".join(parts))
            return {"type": media_type, "blob": len(self.blobs) - 1}
        artifact = uuid.uuid4().hex
        self.made.append(artifact)
        with create_artifact(os.path.join(self._folder, artifact), self._spares, size) as file:
            for part in parts:
                view = memoryview(part)
                while view:
                    view = view[file.write(view) :]
            file.truncate(size)
        return {"type": media_type, "artifact": artifact, "size": size}


def create_artifact(path: str, spares: str, size: int) -> io.FileIO:
    """Return a file to write an artifact of `size` bytes to: a spare where one is large enough, since pages that are
    there already cost a fraction of new ones, or else a new one."""
    for spare in os.scandir(spares) if size >= MIN_SPARE_BYTES else ():
        try:
            if not size // 2 <= spare.stat().st_size <= size * 2:
                continue
            file = io.FileIO(spare.path, "r+")
        except FileNotFoundError:  # another runner took it
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(spare.path, path)
        except BlockingIOError:  # some task still maps it, so it can never be written again
            file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(spare.path)
        except FileNotFoundError:
            file.close()
        else:
            return file
    return io.FileIO(path, "x")


def open_artifact(path: str) -> mmap.mmap | bytes:
    """Return the bytes of an artifact. The map keeps the file's lock, so its pages are not written while it lives."""
    missing = "an input's value is no longer in the store of this node"
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            status = os.fstat(file.fileno())
            # Dropped and written anew between the opening and the lock: not this artifact any more.
            if not os.path.samestat(status, os.stat(path)):
                raise PayloadError(missing)
            # Private pages: the task may write to what it was given, and nobody else sees it.
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) if status.st_size else b""
    except FileNotFoundError:
        raise PayloadError(missing) from None
