"""Owns the data types of services and the states of instances. Rule: all are frozen, none decides."""

from collections.abc import Mapping, Set
from dataclasses import field

from lattice_server.core.frozen import frozen
from lattice_server.core.model import DEFAULT_RESOURCES, Resources
from lattice_server.core.services.budgets import Limits
from lattice_server.core.symbol import Symbol


class Reach(Symbol):
    """Who reaches an instance."""

    NODE = "node"  # Processes on its node.
    CLUSTER = "cluster"  # Whoever reaches its node.


@frozen
class HealthCheck:
    """How an instance is checked: an HTTP path, or without one a connection to its port."""

    http_path: str = ""
    interval_s: float = 10.0
    timeout_s: float = 10.0
    failures: int = 3


@frozen
class ServiceSpec:
    """The definition of a service.

    It has a `command`, or the pickle or the entry point of a Python `function`. `environment` may hold secrets. An
    instance may take `start_timeout_s` to be ready, finishes requests for `drain_timeout_s`, and has `stop_grace_s`
    between SIGTERM and SIGKILL. Without a `concurrency` load starts no instances. `bundle` is the digest of the modules
    of the function. A service with a `base_url` is outside of the cluster: it has no instances, and is always ready.
    """

    name: str
    command: tuple[str, ...] = ()
    working_directory: str = ""
    function: bytes = b""
    entrypoint: str = ""
    bundle: str = ""
    resources: Resources = DEFAULT_RESOURCES
    replicas: int = 1
    max_replicas: int = 1
    health: HealthCheck = field(default_factory=HealthCheck)
    idle_timeout_s: float | None = None
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    secrets: frozenset[str] = frozenset()
    node_selector: tuple[tuple[str, str], ...] = ()
    concurrency: int | None = None
    start_timeout_s: float = 60.0
    drain_timeout_s: float = 30.0
    stop_grace_s: float = 10.0
    reach: Reach = Reach.NODE
    model: str = ""
    engine: str = ""
    base_url: str = ""
    api_key: str = field(default="", repr=False)
    budget: Limits | None = None


class FailureKind(Symbol):
    """The class of the failure of an instance."""

    COMMAND_NOT_FOUND = "command_not_found"
    BAD_ARGUMENTS = "bad_arguments"
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_NOT_TRUSTED = "model_not_trusted"
    DTYPE_UNSUPPORTED = "dtype_unsupported"
    KV_CACHE_TOO_SMALL = "kv_cache_too_small"
    TOO_FEW_GPUS = "too_few_gpus"
    OUT_OF_GPU_MEMORY = "out_of_gpu_memory"
    OUT_OF_MEMORY = "out_of_memory"
    PORT_IN_USE = "port_in_use"
    START_TIMEOUT = "start_timeout"
    EXITED = "exited"
    SIGNALED = "signaled"
    UNHEALTHY = "unhealthy"
    LOST = "lost"
    NOT_STARTED = "not_started"


# Another start of the same definition would end in the same way.
PERMANENT = frozenset(
    {
        FailureKind.COMMAND_NOT_FOUND,
        FailureKind.BAD_ARGUMENTS,
        FailureKind.MODEL_NOT_FOUND,
        FailureKind.MODEL_NOT_TRUSTED,
        FailureKind.DTYPE_UNSUPPORTED,
        FailureKind.KV_CACHE_TOO_SMALL,
        FailureKind.TOO_FEW_GPUS,
        FailureKind.NOT_STARTED,
    }
)

# The program itself ended; another start may succeed.
OWN_FAILURES = frozenset(
    {FailureKind.EXITED, FailureKind.SIGNALED, FailureKind.OUT_OF_MEMORY, FailureKind.OUT_OF_GPU_MEMORY}
)


@frozen
class ServiceFailure:
    """Why an instance ended, with the last lines of its program."""

    kind: FailureKind
    message: str
    exit_status: int | None = None
    signal: int = 0
    last_lines: tuple[str, ...] = ()


class InstanceState(Symbol):
    """The state of an instance."""

    QUEUED = "queued"  # Waits for a lease.
    STARTING = "starting"  # Its program runs and is not ready.
    READY = "ready"  # Takes requests.
    UNHEALTHY = "unhealthy"  # Health checks fail; it gets no new requests.
    DRAINING = "draining"  # Finishes its requests, and gets no new ones.
    STOPPING = "stopping"  # Its processes are being ended.
    ENDED = "ended"  # Its processes are gone and its lease is released.


INSTANCE_TRANSITIONS: Mapping[InstanceState, Set[InstanceState]] = {
    InstanceState.QUEUED: {InstanceState.STARTING, InstanceState.STOPPING, InstanceState.ENDED},
    InstanceState.STARTING: {InstanceState.READY, InstanceState.STOPPING, InstanceState.ENDED},
    InstanceState.READY: {
        InstanceState.UNHEALTHY,
        InstanceState.DRAINING,
        InstanceState.STOPPING,
        InstanceState.ENDED,
    },
    InstanceState.UNHEALTHY: {
        InstanceState.READY,
        InstanceState.DRAINING,
        InstanceState.STOPPING,
        InstanceState.ENDED,
    },
    InstanceState.DRAINING: {InstanceState.STOPPING, InstanceState.ENDED},
    InstanceState.STOPPING: {InstanceState.ENDED},
    InstanceState.ENDED: frozenset(),
}
# The states in which an instance counts towards the wanted number.
WANTED_STATES = frozenset({InstanceState.QUEUED, InstanceState.STARTING, InstanceState.READY, InstanceState.UNHEALTHY})


class ServiceState(Symbol):
    """The state of a service, which follows from its instances."""

    STARTING = "starting"  # No instance is ready yet.
    READY = "ready"  # As many instances are ready as wanted.
    DEGRADED = "degraded"  # Some instances are ready, fewer than wanted.
    IDLE = "idle"  # There is no instance, since none is needed.
    FAILED = "failed"  # Instances cannot start, and no more are tried.
    STOPPING = "stopping"  # Its instances are being stopped.
