"""Ray clusters of somebody else: started as their owner would, used by a server under test."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lattice_server.executors.processes import end_session
from tests.e2e.net import starting
from tests.e2e.rooms import WAIT_S

TOKEN = "0123456789abcdef" * 4
# What a program needs to talk to that Ray.
ACCESS = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


# A program of its owner's: tells the free resources at each line it reads.
DRIVER = """
import json, sys, time, ray
ray.init(sys.argv[1], log_to_driver=False)
for _ in sys.stdin:
    while not (found := ray.available_resources()):
        time.sleep(0.1)
    print("free:" + json.dumps(found), flush=True)
"""


class UsersRay:
    """A Ray that runs, and a program that is connected to it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, address],
            env={**os.environ, **ACCESS},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def free(self) -> dict[str, float]:
        """Return the resources that no task or actor has; nothing when the program has ended."""
        assert self._driver.stdin is not None
        assert self._driver.stdout is not None
        self._driver.stdin.write("\n")
        self._driver.stdin.flush()
        for line in self._driver.stdout:
            if line.startswith("free:"):
                found: dict[str, float] = json.loads(line.removeprefix("free:"))
                return found
        return {}

    def until_free(self, cpus: float) -> None:
        """Wait until that many CPUs are free, no more and no fewer."""
        deadline = time.monotonic() + WAIT_S
        while (found := self.free().get("CPU")) != cpus:
            assert time.monotonic() < deadline, found
            time.sleep(0.1)

    def close(self) -> None:
        """End the program."""
        self._driver.communicate(timeout=30)


def machine_address() -> str:
    """Return this machine's address as Ray sees it."""
    from ray._private.services import get_node_ip_address

    return str(get_node_ip_address())


@contextmanager
def ray_head(folder: Path, ip: str, *flags: str, autoscaling: dict[str, Any] | None = None) -> Iterator[UsersRay]:
    """Run a Ray head while the block runs."""
    with socket.socket() as probe:
        probe.bind((ip, 0))
        address = f"{ip}:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--node-ip-address", ip]
    command += [
        "--port",
        address.rpartition(":")[2],
        "--include-dashboard",
        "false",
        "--disable-usage-stats",
        "--block",
    ]
    environment = {**os.environ, **ACCESS}
    if autoscaling is not None:
        config = folder / "autoscaling.json"
        # The one that only pretends to have other machines: its nodes are processes beside the head.
        provider = {"type": "fake_multinode", "module": PROVIDER, "use_node_id_as_ip": True, "gcs_address": address}
        made = {"cluster_name": "fake", "provider": provider, "idle_timeout_minutes": 5, **autoscaling}
        config.write_text(json.dumps(made | SILENT))
        command += [f"--autoscaling-config={config}"]
        environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    log = folder / "ray.log"
    with starting("ray"):
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*command, *flags], env=environment, stdout=file, stderr=file, start_new_session=True
            )
        users = UsersRay(address)
        found = users.free()  # Waits for Ray itself.
    try:
        assert found, log.read_text()
        yield users
        assert process.poll() is None, log.read_text()
    finally:
        users.close()
        process.terminate()
        process.wait(30)
        end_session(process.pid)


PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
# What a cluster's file has to say, and nobody here uses.
SILENT: dict[str, Any] = {
    "auth": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "rsync_exclude": [],
    "rsync_filter": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
    "upscaling_speed": 1.0,
    "docker": {},
}
