"""Owns the command-line flags of workers. Rule: a worker measures each resource for which there is no flag."""

from collections.abc import Mapping
from pathlib import Path

from lattice_server.config import ServerConfig
from lattice_server.core.frozen import frozen
from lattice_server.core.model import Capacity
from lattice_server.executors.bind_address import ANY, LOOPBACK


@frozen
class Offer:
    """The resources that a worker offers of its machine; it measures a resource that is None. Sizes in bytes."""

    num_cpus: float | None = None
    num_gpus: int | None = None
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    labels: Mapping[str, str] | None = None


def offer_of_head(config: ServerConfig) -> Offer:
    """Return the offer that the configuration makes of the server's own machine."""
    return Offer(config.num_cpus, config.num_gpus, config.memory_bytes, config.gpu_memory_bytes, config.labels)


def offer_of_machine(capacity: Capacity, labels: Mapping[str, str]) -> Offer:
    """Return the offer of a machine that joined."""
    gpu_memory_bytes = capacity.gpus[0].memory_bytes if capacity.gpus else None
    return Offer(capacity.cpu, len(capacity.gpus), capacity.memory_bytes or None, gpu_memory_bytes, labels)


def log_flags(config: ServerConfig) -> list[str]:
    """Return the flags of a worker that logs as the server does."""
    return ["--log-level", config.log_level, "--log-format", config.log_format]


def worker_flags(offer: Offer, *, worker_id: str, node_id: str, store_directory: Path | None, server: str) -> list[str]:
    """Return the flags of a worker that serves `node_id`.

    One with a `store_directory` runs beside the `server`, which clients of the same machine dial at its address; one
    without makes a store of its own.
    """
    flags = ["--worker-id", worker_id, "--node-id", node_id, "--exit-on-close"]
    if store_directory is not None:
        flags += ["--store-dir", str(store_directory), "--server", _from_here(server)]
    if offer.num_cpus is not None:
        flags += ["--num-cpus", str(offer.num_cpus)]
    if offer.num_gpus is not None:
        flags += ["--num-gpus", str(offer.num_gpus)]
    if offer.memory_bytes is not None:
        flags += ["--memory-bytes", str(offer.memory_bytes)]
    if offer.gpu_memory_bytes is not None:
        flags += ["--gpu-memory-bytes", str(offer.gpu_memory_bytes)]
    for name, value in (offer.labels or {}).items():
        flags += ["--label", f"{name}={value}"]
    return flags


def _from_here(server: str) -> str:
    host, _, port = server.rpartition(":")
    return f"{LOOPBACK if host in ANY else host}:{port}"
