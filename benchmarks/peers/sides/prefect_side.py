"""Prefect, with a server of its own on this machine; its tasks run in threads of the flow, by default."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import side

START_S = 120.0
# Each task calls the server several times. With a thread for each of 1,000 tasks, the default, a server on two busy
# processors answered with status 503.
THREADS = 16


@contextmanager
def server() -> Iterator[str]:
    """Run a server with a database in a folder of its own; yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "PREFECT_HOME": folder,
            "PREFECT_LOGGING_LEVEL": "CRITICAL",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }
        command = [str(Path(sys.executable).parent / "prefect"), "server", "start", "--host", "127.0.0.1"]
        with subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL) as process:
            try:
                _wait(f"http://127.0.0.1:{port}/api/health", process)
                yield f"http://127.0.0.1:{port}/api"
            finally:
                process.terminate()
                process.wait(30)


def _wait(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the server of Prefect did not start") from None
            time.sleep(0.2)


@contextmanager
def started(cpus: int) -> Iterator[side.Workloads]:
    """Run a server, and flows in this process."""
    with server() as address:
        os.environ["PREFECT_API_URL"] = address
        # Read the settings when they are imported.
        from prefect import flow, task
        from prefect.task_runners import ThreadPoolTaskRunner

        noop, gather = task(side.noop), task(side.count)

        @flow(task_runner=ThreadPoolTaskRunner(max_workers=THREADS))
        def one() -> Any:
            return noop.submit(1).result()

        @flow(task_runner=ThreadPoolTaskRunner(max_workers=THREADS))
        def chain() -> Any:
            last = noop.submit(1)
            for _ in range(side.LENGTH - 1):
                last = noop.submit(last)
            return last.result()

        @flow(task_runner=ThreadPoolTaskRunner(max_workers=THREADS))
        def fan() -> Any:
            first = noop.submit(1)
            middle = [noop.submit(first) for _ in range(side.WIDTH)]
            return gather.submit(middle).result()

        yield {"W1": one, "W2": chain, "W3": fan}


if __name__ == "__main__":
    side.run(started, "prefect")
