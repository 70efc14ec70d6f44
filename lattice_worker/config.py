"""Owns what a worker is told at its start."""

from collections.abc import Mapping
from dataclasses import dataclass, field

HEAD_STORE = "head"  # What the server calls its own store.


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """The flags of one worker. Unset capacities are measured. `store_name` is whose store of large values it uses:
    `head`, or its own node's. `server` is what a client in a task dials. `host_fd` is a socket to who started it and
    fetches large values. `tls_ca`, `tls_cert` and `tls_key` are PEM files."""

    target: str
    worker_id: str
    node_id: str
    store_directory: str
    store_name: str = HEAD_STORE
    server: str = ""
    token: str = field(default="", repr=False)
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    insecure: bool = False
    num_cpus: float | None = None
    num_gpus: int | None = None
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    exit_on_close: bool = False
    host_fd: int | None = None
