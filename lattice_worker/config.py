"""The configuration of a worker, fixed at its start."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lattice_worker.containers.config import EngineConfig

HEAD_STORE = "head"  # The name of the server's own store.


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """The flags of one worker. Capacities that are not set are measured.

    Attributes:
        store_name: the node in whose store the worker keeps artifacts: `head`, or its own.
        server: the address that clients in tasks connect to.
        host_fd: a socket to the parent process, which fetches artifacts of other nodes.
        engine: the container engine of the isolation level `docker`.
        named_group: the control group below which those of sandboxes are made; None for one that systemd delegates,
            empty for none.
        gateway_port: the port at which the gateway listens for those of other nodes; 0 for a free one.
        egress_networks: networks that are not public, and that tasks may connect to when they list servers there.
        preload: modules that are imported once, before the processes of tasks are forked.
        tls_ca, tls_cert, tls_key: PEM files.
    """

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
    engine: EngineConfig = field(default_factory=EngineConfig)
    egress_networks: str = ""
    gateway_port: int = 0
    named_group: str | None = None
    preload: tuple[str, ...] = ()
