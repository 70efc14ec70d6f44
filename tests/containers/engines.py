"""A container engine of the tests' own, with the sandbox image."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / ".engine"  # Kept, because most of the image changes seldom.
START_S = 60.0
STOP_S = 60.0


def lack() -> str:
    """Return why this machine cannot run an engine; nothing when it can."""
    if os.geteuid() != 0:
        return "an engine of its own needs root"
    return "" if shutil.which("dockerd") else "there is no dockerd: `scripts/install_missing.sh docker`"


@contextmanager
def engine() -> Iterator[str]:
    """Run an engine that has the image while the block runs; yield its address."""
    with tempfile.TemporaryDirectory(prefix="lattice-e-") as folder, open(f"{folder}/log", "wb") as log:
        process = subprocess.Popen([str(ROOT / "scripts/engine.sh"), folder, str(DATA)], stdout=log, stderr=log)
        try:
            _wait(f"{folder}/docker.sock", process, f"{folder}/log")
            address = f"unix://{folder}/docker.sock"
            build_image(address)
            yield address
        finally:
            process.terminate()
            process.wait(STOP_S)


def build_image(address: str) -> None:
    """Build the sandbox image, with numpy."""
    command = [sys.executable, "-m", "lattice_worker.containers.image", "--package", "numpy"]
    environment = {**os.environ, "LATTICE_DOCKER_HOST": address}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _wait(path: str, process: "subprocess.Popen[bytes]", log: str) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(path)
                return
            except OSError:
                time.sleep(0.05)  # The engine sends no message when it listens.
    raise AssertionError(f"the engine did not start: {Path(log).read_text()}")


def main() -> None:
    """Build the image once, so that tests find its large part."""
    if reason := lack():
        print(f"no tests of containers: {reason}")
        return
    with engine():
        pass


class Gate:
    """A socket through which an engine is reached, and whose connections can be cut."""

    def __init__(self, address: str, folder: Path) -> None:
        self.address = f"unix://{folder}/gate"
        self._engine = address.removeprefix("unix://")
        self._open: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{folder}/gate")
        self._listener.listen()

    def __enter__(self) -> Self:
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """Break all connections."""
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._listener.accept()
                engine = socket.socket(socket.AF_UNIX)
                engine.connect(self._engine)
                self._open += [caller, engine]
                for source, target in ((caller, engine), (engine, caller)):
                    threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    main()
