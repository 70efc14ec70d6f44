"""Ray clusters of somebody else: started as their owner would, used by a server under test."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lattice_server.executors.leftovers import end_session

TOKEN = "0123456789abcdef" * 4
# What a program needs to talk to that Ray.
ACCESS = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


def machine_address() -> str:
    """Return this machine's address as Ray sees it."""
    return ask("import ray._private.services as s; print(s.get_node_ip_address())")


def ask(script: str) -> str:
    """Run a script that uses Ray, and return the last line it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **ACCESS}, check=True, capture_output=True, text=True
    )
    return done.stdout.splitlines()[-1]


def free_resources(address: str) -> dict[str, float]:
    """Return what nobody uses of that Ray."""
    script = (
        f"import json, ray; ray.init({address!r}, log_to_driver=False); print(json.dumps(ray.available_resources()))"
    )
    found: dict[str, float] = json.loads(ask(script))
    return found


@contextmanager
def ray_head(folder: Path, ip: str, *flags: str, autoscaling: dict[str, Any] | None = None) -> Iterator[str]:
    """Run a Ray head while the block runs; yield where it listens."""
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
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, *flags], env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        for _ in range(3):
            # Waits for Ray itself, and fails when there is none in time.
            if process.poll() is None and free_resources(address):
                break
        yield address
        assert process.poll() is None, log.read_text()
    finally:
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
