"""Owns the transfer of large values between the workers' hosts of one Ray. Rule: Ray moves the bytes.

A value goes from the store of one node through Ray's object stores into a file of another node, in parts: the
part of Ray's memory that it uses is bounded, and one part is sent while another is written.

The worker asks over a socket that it inherits, a JSON object a line. First it says where its own large values lie:
`{"store"}`. Then it asks for others: `{"id", "node", "artifact", "size", "part", "patience_s"}`, where `part` is an
empty file to be filled and `patience_s` how long Ray may take for each step. It is sent `{"id"}` after every
step and, last, `{"id", "end"}` with the reason if it failed. A worker that no longer waits deletes the file.
"""

import contextlib
import json
import mmap
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

# Marks bytes that Ray copies into its memory as they are; nothing is unpickled here.
from pickle import PickleBuffer
from typing import Any

import ray

PART_BYTES = 8 * 1024 * 1024
AHEAD = 4
WHY_CHARACTERS = 1000


def host_name(store_name: str) -> str:
    """Return the name of the host of the worker that uses a store; it is unique in the namespace of one driver."""
    return f"lattice-host-{store_name}"


class Exchange:
    """The exchange of one host: it sends its worker's values to other hosts, and fetches values for its worker."""

    def __init__(self) -> None:
        self._store = ""
        self._hosts: dict[str, Any] = {}

    def serve(self, connection: socket.socket) -> None:
        """Serve the requests of the worker at the other end until it is gone."""
        with connection, connection.makefile("rb") as lines:
            for line in lines:
                wanted = json.loads(line)
                if "store" in wanted:
                    self._store = wanted["store"]
                else:
                    threading.Thread(target=self._answer, args=(connection, wanted), daemon=True).start()

    def read(self, artifact_id: str, offset: int) -> "Part":
        """Return a part of an artifact of this node's store. Raises FileNotFoundError."""
        if not self._store:
            raise FileNotFoundError("the worker has no store yet")
        path = Path(self._store) / os.path.basename(artifact_id)
        with path.open("rb") as file:
            # A file is not written while it is mapped. One that was dropped before it was opened may be another value.
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise FileNotFoundError("it was dropped")
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return Part(memoryview(whole)[offset : offset + PART_BYTES])

    def _answer(self, connection: socket.socket, wanted: dict[str, Any]) -> None:
        def reply(**more: str) -> None:
            # Small enough to be sent in one piece, even while other threads send.
            connection.sendall(json.dumps({"id": wanted["id"], **more}).encode() + b"\n")

        with contextlib.suppress(OSError):  # the worker is gone
            try:
                for _ in self._fetched_again(wanted):
                    reply()
                why = ""
            except (ray.exceptions.RayError, ValueError, OSError) as error:
                self._hosts.pop(wanted["node"], None)
                why = str(error) or type(error).__name__
            reply(end=why[-WHY_CHARACTERS:])

    def _fetched_again(self, wanted: dict[str, Any]) -> Iterator[None]:
        """Do what `_fetched` does, once more when the host that was known of the node is gone."""
        if wanted["node"] in self._hosts:
            try:
                yield from self._fetched(wanted)
                return
            except ray.exceptions.RayActorError:
                # A worker that was replaced has a new host of the same name.
                self._hosts.pop(wanted["node"], None)
        yield from self._fetched(wanted)

    def _fetched(self, wanted: dict[str, Any]) -> Iterator[None]:
        """Fill the file and yield after every step. Raises ValueError when the node has no host, or what Ray raises."""
        size: int = wanted["size"]
        # The file exists unless the worker gave up already.
        with open(wanted["part"], "r+b", buffering=0) as file:
            host = self._host(wanted["node"])
            offsets = iter(range(0, size, PART_BYTES))
            coming: list[Any] = []
            while file.tell() < size:
                while len(coming) < AHEAD and (offset := next(offsets, None)) is not None:
                    coming.append(host.read.remote(wanted["artifact"], offset))
                data = ray.get(coming.pop(0), timeout=wanted["patience_s"])
                expected = min(PART_BYTES, size - file.tell())
                if len(data) != expected or file.write(data) != expected:
                    raise ValueError(f"a part has {len(data)} bytes instead of {expected}")
                # Ray frees its memory when the last reference is gone.
                del data
                yield

    def _host(self, node: str) -> Any:
        if (host := self._hosts.get(node)) is None:
            # This asks Ray's head.
            host = self._hosts[node] = ray.get_actor(host_name(node))
        return host


class Part:
    """Bytes that Ray transfers without a copy by Python; they arrive as a memoryview."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return memoryview, (PickleBuffer(self._data),)
