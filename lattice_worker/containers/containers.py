"""The containers of one agent: started on demand, each connected by a socket of its own, and removed at their end.

Rule: a container lives as long as its connection. The containers of a killed agent are removed by the next agent.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

from lattice_worker import background
from lattice_worker.containers import spec
from lattice_worker.containers.config import EngineConfig
from lattice_worker.containers.digest import source_digest
from lattice_worker.containers.engine import Engine, EngineError
from lattice_worker.pool.zygote import Process
from lattice_worker.runner.container import SOCKET
from lattice_worker.sandbox.policy import Policy, environment_of
from lattice_worker.store.artifact_staging import locked

FOLDER_PREFIX = "lattice-containers-"
LABEL = "lattice.folder"  # Of a container: the folder of its agent, which that has locked.
SOCKET_NAME = os.path.basename(SOCKET)
REPLY_BYTES = 4096
START_S = 60.0
REMOVE_S = 10.0
NEW_S = 10.0


class Container(Process):
    """One container; `ended` is the exit status of its runner. `on_oom` is called when memory ran out in it."""

    def __init__(self, kill: "Callable[[Container], None]") -> None:
        super().__init__(lambda: kill(self))
        self.id = ""
        self.connection: socket.socket | None = None
        self.is_killed = False
        self.oom_kills = 0
        self.pids_refused = 0
        self.on_oom: Callable[[], None] = lambda: None
        self.died = asyncio.get_running_loop().create_future()  # With the status of its first process.
        self.gone = asyncio.Event()

    def read(self) -> None:
        """Take the report of the first process, or the end of the connection."""
        assert self.connection is not None
        try:
            data = self.connection.recv(REPLY_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            report = json.loads(data)
            self.cpu_s = float(report["cpu"])
            self.oom_kills, self.pids_refused = int(report["oom_kills"]), int(report["pids_refused"])
            self.end(int(report["ended"]))
        elif self.is_killed:
            self.end(-signal.SIGKILL)
        else:
            # The first process was killed by another; when memory was the reason, the engine says so before it says
            # that the container ended.
            asyncio.get_running_loop().remove_reader(self.connection)
            self.died.add_done_callback(lambda _: self.end(-signal.SIGKILL))

    def end(self, status: int) -> None:
        """Note that the runner has ended."""
        if self.connection is not None:
            asyncio.get_running_loop().remove_reader(self.connection)
            self.connection.close()
            self.connection = None
        if not self.ended.done():
            self.ended.set_result(status)


class Containers:
    """Starts containers. `open` comes first."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._numbers = count(1)
        self._engine: Engine | None = None
        self._folder = ""
        self._lock = -1
        self._live: dict[str, Container] = {}
        self._removing: set[asyncio.Task[None]] = set()
        self._opening = asyncio.Lock()
        self._is_closed = False

    async def open(self) -> None:
        """Connect to the engine, and remove what agents that were killed left. Raises EngineError."""
        async with self._opening:
            if self._is_closed:
                raise EngineError("this worker is ending")
            if self._engine is None:
                await self._open()

    async def _open(self) -> None:
        engine = await Engine.connect(self._config)
        try:
            await engine.require_image(await asyncio.to_thread(source_digest))
            self._folder = self._folder or self._new_folder()
            await self._sweep(engine)
        except BaseException:
            await engine.close()
            raise
        engine.listen(LABEL, self._folder, self._take_event)
        self._engine = engine

    async def start(self, policy: Policy, descriptors: Sequence[int]) -> Container:
        """Return a new container whose runner has these descriptors. Raises EngineError."""
        await self.open()
        assert self._engine is not None
        container, engine = Container(self._kill), self._engine
        name = f"{os.path.basename(self._folder)}-{next(self._numbers)}"
        folder = Path(self._folder) / name
        folder.mkdir(mode=0o755)
        try:
            with _listening(folder / SOCKET_NAME) as listener:
                labels, environment = {LABEL: self._folder}, environment_of(os.environ)
                environment.pop("PATH", None)  # The image has one of its own.
                request = spec.body(policy, str(folder), self._config.runtime, labels, environment)
                container.id = await engine.create(name, request)
                self._live[container.id] = container
                await engine.start(container.id)
                container.connection = await self._connection(container, listener)
            packet = json.dumps({"policy": policy.to_json()}).encode()
            socket.send_fds(container.connection, [packet], descriptors)
            asyncio.get_running_loop().add_reader(container.connection, container.read)
        except BaseException as error:
            container.end(-signal.SIGKILL)
            self._remove(container)
            if isinstance(error, OSError):
                raise EngineError(f"the container could not be connected: {error}") from None
            raise
        finally:
            # The connection needs no name any more, and the container's next process must find none.
            shutil.rmtree(folder, ignore_errors=True)
        return container

    async def close(self) -> None:
        """End all containers, and wait until the engine has removed them."""
        self._is_closed = True
        try:
            await self._end_all()
        finally:
            # Also when a second signal ends the worker at once: the engine removes the containers by itself.
            if self._folder:
                shutil.rmtree(self._folder, ignore_errors=True)
                os.close(self._lock)
                self._folder = ""

    async def _end_all(self) -> None:
        for container in list(self._live.values()):
            container.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REMOVE_S):
                await asyncio.gather(*(container.gone.wait() for container in list(self._live.values())))
        if self._removing:
            await asyncio.wait(self._removing, timeout=REMOVE_S)
        if self._engine is not None:
            await self._engine.close()
            self._engine = None

    async def _connection(self, container: Container, listener: socket.socket) -> socket.socket:
        """Return the connection of a container that was started. Raises EngineError."""
        loop = asyncio.get_running_loop()
        accepting = loop.create_task(loop.sock_accept(listener))
        try:
            await asyncio.wait((accepting, container.died), timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
            if not accepting.done():
                how = f"ended with status {container.died.result()}" if container.died.done() else "did not connect"
                raise EngineError(f"the container {how}; does its image have this worker's code?")
            connection, _ = accepting.result()
        finally:
            accepting.cancel()
        connection.setblocking(False)
        return connection

    def _kill(self, container: Container) -> None:
        container.is_killed = True
        # The first process ends with the connection, at once; the engine's way takes longer and is sure.
        if container.connection is not None:
            with contextlib.suppress(OSError):
                container.connection.shutdown(socket.SHUT_WR)
        self._remove(container)

    def _remove(self, container: Container) -> None:
        if container.id and not container.gone.is_set():
            task = background.start(self._remove_now(container), lambda _: container.end(-signal.SIGKILL))
            self._removing.add(task)
            task.add_done_callback(self._removing.discard)

    async def _remove_now(self, container: Container) -> None:
        if self._engine is not None:
            with contextlib.suppress(EngineError):  # Its next agent removes it.
                await self._engine.remove(container.id)
        container.end(-signal.SIGKILL)

    def _take_event(self, action: str, container_id: str, attributes: dict[str, str]) -> None:
        if not action:
            self._lose_engine()
            return
        container = self._live.get(container_id)
        if container is None:
            return
        match action:
            case "oom":
                container.oom_kills += 1
                container.on_oom()
            case "die":
                if not container.died.done():
                    container.died.set_result(attributes.get("exitCode", ""))
            case "destroy":
                container.gone.set()
                del self._live[container_id]

    def _lose_engine(self) -> None:
        """Connect again for the next container. Without the engine's events these here cannot be supervised."""
        engine, self._engine = self._engine, None
        for container in list(self._live.values()):
            container.end(-signal.SIGKILL)
            container.gone.set()
        self._live.clear()
        if engine is not None:
            task = background.start(engine.close(), background.only_log)
            self._removing.add(task)
            task.add_done_callback(self._removing.discard)

    def _new_folder(self) -> str:
        """Return a folder that is locked while this process lives; folders of processes that ended are deleted."""
        parent = Path(tempfile.gettempdir())
        for left in parent.glob(f"{FOLDER_PREFIX}*"):
            # One that is new may not be locked yet.
            with contextlib.suppress(OSError), locked(left):
                if time.time() - left.stat().st_mtime > NEW_S:
                    shutil.rmtree(left, ignore_errors=True)
        found = tempfile.mkdtemp(prefix=FOLDER_PREFIX)
        self._lock = os.open(found, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return found

    async def _sweep(self, engine: Engine) -> None:
        """Remove the containers of agents of this machine that have ended."""
        for container_id, folder in (await engine.labelled(LABEL)).items():
            if folder != self._folder and not _is_locked(folder):
                with contextlib.suppress(EngineError):
                    await engine.remove(container_id)


@contextlib.contextmanager
def _listening(path: Path) -> Iterator[socket.socket]:
    """Listen at a path while the block runs; every user may connect who is shown the folder."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen(1)
        listener.setblocking(False)
        yield listener


def _is_locked(folder: str) -> bool:
    try:
        with locked(Path(folder)):
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False
