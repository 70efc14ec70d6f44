"""Owns the command that starts a worker process. Rule: every executor starts the same program."""

import sys
from pathlib import Path

from lattice_server.config import ServerConfig


def worker_command(
    config: ServerConfig, *, target: str, worker_id: str, node_id: str, store_directory: Path
) -> list[str]:
    """Return the command line of a worker that dials `target` and serves `node_id`."""
    command = [sys.executable, "-m", "lattice_worker", "--addr", target, "--worker-id", worker_id]
    command += ["--node-id", node_id, "--store-dir", str(store_directory), "--exit-on-close"]
    if config.num_cpus is not None:
        command += ["--num-cpus", str(config.num_cpus)]
    if config.num_gpus is not None:
        command += ["--num-gpus", str(config.num_gpus)]
    if config.memory_bytes is not None:
        command += ["--memory-bytes", str(config.memory_bytes)]
    if config.gpu_memory_bytes is not None:
        command += ["--gpu-memory-bytes", str(config.gpu_memory_bytes)]
    for name, value in config.labels.items():
        command += ["--label", f"{name}={value}"]
    return command
