"""Owns the messages between the machine of a service and the engine. Rule: an event is a fact, an effect a command."""

from lattice_server.core.frozen import frozen
from lattice_server.core.services.model import ServiceFailure, ServiceSpec


@frozen
class Defined:
    """The service has another definition."""

    spec: ServiceSpec


@frozen
class Scaled:
    """A caller changed how many instances there are."""

    replicas: int
    max_replicas: int


@frozen
class Stopped:
    """A caller stopped the service."""


@frozen
class UseChanged:
    """So many tasks and calls wait for the service, and so many running tasks have its address."""

    waiting: int
    users: int


@frozen
class NodesChanged:
    """These nodes accept leases; instances on others have to leave."""

    node_ids: frozenset[str]


@frozen
class InstanceStarted:
    """The program of an instance was started on a node."""

    instance_id: str
    node_id: str
    node_ip: str


@frozen
class InstanceWaits:
    """An instance that starts is not ready yet; `detail` says what it waits for."""

    instance_id: str
    detail: str


@frozen
class InstanceReady:
    """The checks of an instance succeed; it listens at `endpoint`."""

    instance_id: str
    endpoint: str


@frozen
class InstanceUnhealthy:
    """The checks of an instance fail, `failures` times in a row so far."""

    instance_id: str
    failures: int
    detail: str


@frozen
class LoadReported:
    """An instance serves so many requests."""

    instance_id: str
    in_flight: int


@frozen
class InstanceEnded:
    """The processes of an instance are gone. Without a failure it ended since it was asked to, or by success."""

    instance_id: str
    failure: ServiceFailure | None


Event = (
    Defined
    | Scaled
    | Stopped
    | UseChanged
    | NodesChanged
    | InstanceStarted
    | InstanceWaits
    | InstanceReady
    | InstanceUnhealthy
    | LoadReported
    | InstanceEnded
)


@frozen
class StartInstance:
    """Queue a lease for a new instance."""

    instance_id: str


@frozen
class StopInstance:
    """End the processes of an instance: SIGTERM, and SIGKILL after `grace_s` seconds."""

    instance_id: str
    grace_s: float


@frozen
class CancelInstance:
    """Give up the lease of an instance that has no processes yet."""

    instance_id: str


@frozen
class RoutesChanged:
    """Other instances than before take requests."""


@frozen
class ServiceGone:
    """The service was stopped, and its last instance has ended."""


Effect = StartInstance | StopInstance | CancelInstance | RoutesChanged | ServiceGone
