"""A container engine of the tests' own, with the sandbox image."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
                time.sleep(0.05)  # The engine tells nobody when it listens.
    raise AssertionError(f"the engine did not start: {Path(log).read_text()}")
