"""Artifacts of other nodes, fetched past the server: the parent process of the worker fetches them.

Rule: an artifact is fetched whole or not at all, and a fetch without progress ends after `PATIENCE_S`.

They talk in JSON objects, one a line, over a socket that the worker inherits; `Exchange` in the server's package is the
other end.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import socket
from pathlib import Path
from typing import Any

from lattice_worker import background

log = logging.getLogger(__name__)

PATIENCE_S = 5.0  # For every step, some MiB.
AT_A_TIME = 4
# How long a node is skipped from which nothing came: without it, each fetch from an unreachable node would take
# `PATIENCE_S`.
SKIP_NODE_S = 60.0


class PeerFetchError(Exception):
    """An artifact was not fetched."""


class PeerFetcher:
    """The artifacts in transfer. Everything runs on one event loop."""

    def __init__(self, descriptor: int, store_directory: str, incoming: Path, patience_s: float = PATIENCE_S) -> None:
        self._socket = socket.socket(fileno=descriptor)
        # Processes of tasks must not inherit it.
        self._socket.set_inheritable(False)
        self._store_directory, self._incoming, self._patience_s = store_directory, incoming, patience_s
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Queue[dict[str, Any]]] = {}
        self._skipped_until: dict[str, float] = {}
        self._turns = asyncio.Semaphore(AT_A_TIME)
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Tell the parent process where this node's store is, and read its answers."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._socket)
        self._send(store=self._store_directory)
        self._reading = background.start(self._listen(reader), lambda _: self._fail_all())

    def close(self) -> None:
        """Close the socket."""
        if self._reading is not None:
            self._reading.cancel()
        if self._writer is not None:
            self._writer.close()

    async def bring(self, node_id: str, path: Path, size_bytes: int) -> bool:
        """Fetch an artifact from a node's store to `path`, whose name it has; return whether it is there.

        A node from which nothing came is skipped for `SKIP_NODE_S`.
        """
        loop = asyncio.get_running_loop()
        if self._skipped_until.get(node_id, 0.0) > loop.time():
            return False
        number = next(self._numbers)
        part = self._incoming / f"{path.name}.{number}"
        answers = self._answers[number] = asyncio.Queue()
        try:
            async with self._turns:
                part.touch()
                wanted = {"node": node_id, "artifact": path.name, "size": size_bytes, "part": str(part)}
                self._send(id=number, **wanted, patience_s=self._patience_s)
                await self._ended(answers)
            part.rename(path)
            self._skipped_until.pop(node_id, None)
        except TimeoutError:
            text = "nothing came from the node for %g s; the server is asked instead"
            log.warning(text, self._patience_s, extra={"node_id": node_id})
            self._skipped_until[node_id] = loop.time() + SKIP_NODE_S
            return False
        except (PeerFetchError, OSError) as error:
            log.info("%s was not fetched from the node: %s", path.name, error, extra={"node_id": node_id})
            return False
        finally:
            del self._answers[number]
            # The parent process may still write to it: without a name the file is freed when that ends.
            part.unlink(missing_ok=True)
        return True

    async def _ended(self, answers: "asyncio.Queue[dict[str, Any]]") -> None:
        while True:
            async with asyncio.timeout(self._patience_s):
                answer = await answers.get()
            if answer.get("end"):
                raise PeerFetchError(answer["end"])
            if "end" in answer:
                return

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                answer = json.loads(line)
                if (answers := self._answers.get(answer["id"])) is not None:
                    answers.put_nowait(answer)
        self._fail_all()

    def _fail_all(self) -> None:
        self._writer = None
        for answers in self._answers.values():
            answers.put_nowait({"end": "the parent process of the worker is gone"})

    def _send(self, **words: Any) -> None:
        if self._writer is None:
            raise PeerFetchError("the parent process of the worker is gone")
        self._writer.write(json.dumps(words).encode() + b"\n")
