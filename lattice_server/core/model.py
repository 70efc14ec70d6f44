"""Owns the data types of workflows, tasks, values, resources and failures. Rule: all are frozen, none decides."""

import sys
from collections.abc import Mapping
from dataclasses import field

from lattice_server.core.environment import Variables
from lattice_server.core.frozen import frozen
from lattice_server.core.runtime import ANY_RUNTIME, Runtime
from lattice_server.core.symbol import Symbol


@frozen
class Artifact:
    """A reference to `size_bytes` encoded bytes in the store of `node_id`."""

    artifact_id: str
    size_bytes: int
    node_id: str


class Isolation(Symbol):
    """How strictly an attempt is isolated, from the weakest to the strictest."""

    NONE = "none"
    SUBPROCESS = "subprocess"
    SECCOMP = "seccomp"
    DOCKER = "docker"


@frozen
class Payload:
    """One encoded value: JSON text (str), bytes, or a reference. The core does not decode it.

    `produced_at` is the level of the task that made it; `NONE` for a value of a caller.
    """

    media_type: str
    content: str | bytes | Artifact
    produced_at: Isolation = Isolation.NONE

    @property
    def kept_bytes(self) -> int:
        """The memory that it takes in the server; zero for a reference."""
        return 0 if isinstance(self.content, Artifact) else sys.getsizeof(self.content)


# Keys of mappings and positions in lists, from the outside in.
Path = tuple[str | int, ...]


@frozen
class OutputRef:
    """One output of one task. `path` selects a part of it, step by step.

    An optional one is null when that task was skipped, or failed in a run that finishes independent tasks; in the list
    of a mapped task, each such item is null. A task that requires the output is skipped instead.
    """

    task_id: str
    output: str
    is_optional: bool = False
    path: Path = ()


@frozen
class Parameter:
    """A run parameter, by name."""

    name: str


@frozen
class BindingList:
    """A list bound item by item."""

    items: tuple["Binding", ...]


@frozen
class BindingMap:
    """A string-keyed map bound value by value."""

    entries: Mapping[str, "Binding"]


@frozen
class Selection:
    """A part of a known value; the worker that decodes the value takes the steps of `path`."""

    value: "Binding"
    path: Path


Binding = Payload | OutputRef | Parameter | BindingList | BindingMap | Selection
Outputs = Mapping[str, Payload]


@frozen
class Resources:
    """The resources that one attempt takes while it runs. Memory in bytes; `gpu` below one shares a device."""

    cpu: float = 1.0
    memory_bytes: int = 0
    gpu: float = 0.0
    gpu_memory_bytes: int = 0


@frozen
class Gpu:
    """One device of a node."""

    index: int
    model: str = ""
    memory_bytes: int = 0
    uuid: str = ""


@frozen
class Capacity:
    """The resources of a node. `slots` limits attempts in processes of their own, `async_slots` coroutines."""

    cpu: float
    memory_bytes: int = 0
    gpus: tuple[Gpu, ...] = ()
    slots: int = 64
    async_slots: int = 4096


class FailureKind(Symbol):
    """The class of a failure, which retry policies name."""

    USER_ERROR = "user_error"
    CRASHED = "crashed"
    OUT_OF_MEMORY = "out_of_memory"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    WORKER_LOST = "worker_lost"
    PAYLOAD = "payload"
    RESOURCES = "resources"
    UPSTREAM = "upstream"
    INTERNAL = "internal"
    POLICY = "policy"
    CPU_TIME = "cpu_time"
    OUTPUT_SIZE = "output_size"
    SANDBOX_SETUP = "sandbox_setup"
    UNTRUSTED_INPUT = "untrusted_input"
    NESTED_RESOURCES = "nested_resources"
    SECRET_MISSING = "secret_missing"
    SERVICE_FAILED = "service_failed"


RETRIED_BY_DEFAULT = frozenset(map(FailureKind, ("user_error", "crashed", "out_of_memory", "timeout", "cpu_time")))


@frozen
class Failure:
    """Why an attempt, a task or a run did not succeed."""

    kind: FailureKind
    message: str
    type: str = ""
    traceback: str = ""
    exception: Payload | None = None
    task_id: str = ""
    exit_status: int | None = None
    cause: "Failure | None" = None
    base_types: tuple[str, ...] = ()


@frozen
class RetryPolicy:
    """When a failed attempt is retried."""

    max_attempts: int = 1
    initial_backoff_s: float = 0.1
    backoff_multiplier: float = 2.0
    max_backoff_s: float = 30.0
    retry_on: frozenset[FailureKind] = RETRIED_BY_DEFAULT
    retry_on_types: frozenset[str] = frozenset()
    max_worker_losses: int = 3

    def allows(self, failure: Failure, failed_attempts: int) -> bool:
        """Whether another attempt follows after `failed_attempts` attempts, the last of which ended in `failure`."""
        if failed_attempts >= self.max_attempts or failure.kind not in self.retry_on:
            return False
        if failure.kind is not FailureKind.USER_ERROR or not self.retry_on_types:
            return True
        return not self.retry_on_types.isdisjoint((failure.type, *failure.base_types))

    def backoff_s(self, failed_attempts: int) -> float:
        """Seconds to wait before the attempt that follows `failed_attempts` failed ones."""
        if self.initial_backoff_s == 0:
            return 0.0
        try:
            growth = self.backoff_multiplier ** (failed_attempts - 1)
        except OverflowError:
            return self.max_backoff_s
        return min(self.max_backoff_s, self.initial_backoff_s * growth)


NODE_LABEL = "lattice/node"


@frozen
class NodeSpec:
    """A node and the worker that serves it. A worker with `entrypoints` runs only those; any other runs Python.

    `isolation_refusals` says why it does not offer a level, in words for people. `network_isolations` are the levels at
    which it enforces `TaskSpec.network`. `limits_memory_by_cgroup` is None when the worker does not say.
    """

    node_id: str
    worker_id: str
    hostname: str
    node_ip: str
    capacity: Capacity
    labels: Mapping[str, str]
    isolations: frozenset[Isolation]
    runtime: Runtime
    pid: int
    entrypoints: frozenset[str] = frozenset()
    isolation_refusals: Mapping[Isolation, str] = field(default_factory=dict)
    network_isolations: frozenset[Isolation] = frozenset()
    limits_memory_by_cgroup: bool | None = None

    def label(self, key: str) -> str | None:
        """Return the value of a label; every node has its own id as `NODE_LABEL`."""
        return self.node_id if key == NODE_LABEL else self.labels.get(key)


@frozen(weakref_slot=True)
class Bundle:
    """Modules that are sent with functions. `content` is sent to workers as it is."""

    digest: str
    content: object
    size_bytes: int = 0


@frozen(weakref_slot=True)
class Function:
    """Code to run. `definition`, of `size_bytes`, is sent to workers as it is.

    `entrypoint` is the name of a function that workers have; empty when the code is sent. It needs `runtime`.
    """

    digest: str
    is_async: bool
    definition: object
    bundle: Bundle | None = None
    entrypoint: str = ""
    runtime: Runtime = ANY_RUNTIME
    size_bytes: int = 0


class BatchScope(Symbol):
    """Which tasks may be in one batch."""

    SERVER = "server"
    RUN = "run"


@frozen
class BatchPolicy:
    """At most `max_size` tasks in one call; the first of them waits at most `max_wait_s` for the others."""

    max_size: int
    max_wait_s: float = 0.0
    scope: BatchScope = BatchScope.SERVER


@frozen
class Condition:
    """Whether a task runs at all: its `output` must be true, or equal to `equals`; the opposite when `is_negated`."""

    output: OutputRef
    equals: Payload | None = None
    is_negated: bool = False


DEFAULT_RETRY = RetryPolicy()
DEFAULT_RESOURCES = Resources()


@frozen
class TaskSpec:
    """The definition of one task of a workflow.

    `over` names the input whose list the task is mapped over. `is_service` tells that it does not end by itself.
    `network` are the servers that its sandbox may connect to, each `name:port`.
    `variables` are those of its environment by name and value, `secrets` those by name and name of the secret.
    `services` are the names of the services that it needs.
    """

    task_id: str
    function: Function
    display_name: str = ""
    inputs: Mapping[str, Binding] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    resources: Resources = DEFAULT_RESOURCES
    retry: RetryPolicy = DEFAULT_RETRY
    attempt_timeout_s: float | None = None
    total_timeout_s: float | None = None
    isolation: Isolation = Isolation.NONE
    node_selector: tuple[tuple[str, str], ...] = ()
    priority: int = 0
    batch: BatchPolicy | None = None
    max_parallel: int = 0
    concurrency_key: str = ""
    over: str = ""
    condition: Condition | None = None
    is_service: bool = False
    network: tuple[str, ...] = ()
    variables: Variables = ()
    secrets: Variables = ()
    services: tuple[str, ...] = ()


class FailurePolicy(Symbol):
    """How a failed task affects the others."""

    FAIL_FAST = "fail_fast"
    FINISH_INDEPENDENT = "finish_independent"


@frozen
class WorkflowSpec:
    """The definition of a workflow."""

    tasks: tuple[TaskSpec, ...]
    display_name: str = ""
    parameters: Mapping[str, Payload] = field(default_factory=dict)
    failure_policy: FailurePolicy = FailurePolicy.FAIL_FAST
