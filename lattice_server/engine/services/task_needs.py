"""Owns the scheduler's view of services, and how many of its tasks need each; on the main thread."""

from collections.abc import Callable, Sequence

from lattice_server.core.messages import SchedulerEvent, ServiceChanged, ServiceNeeded
from lattice_server.core.model import Failure, FailureKind
from lattice_server.core.services.model import Reach, ServiceState
from lattice_server.core.tenancy import key_of
from lattice_server.engine.services.entry import ServiceEntry

ENDED = "there is no such service"


class TaskNeeds:
    """Tells the scheduler of services by `post`. Rule: it is told of each change once."""

    def __init__(self, post: Callable[[Sequence[SchedulerEvent]], None]) -> None:
        self._post = post
        self._told: dict[str, ServiceChanged] = {}
        self._needed: dict[str, ServiceNeeded] = {}

    def tell(self, entry: ServiceEntry) -> None:
        """Tell the scheduler of the condition of a service, if it is another one than before."""
        self._send(_condition(entry))

    def forget(self, entry: ServiceEntry) -> None:
        """Tell the scheduler that a service has ended."""
        key = key_of(entry.name, entry.tenant)
        self._send(ServiceChanged(key, detail=ENDED))
        del self._told[key]

    def note(self, needed: ServiceNeeded) -> None:
        """Take how many tasks need a service."""
        if needed.waiting or needed.others:
            self._needed[needed.key] = needed
        else:
            self._needed.pop(needed.key, None)

    def count(self, entry: ServiceEntry) -> tuple[int, int]:
        """Return how many tasks of the scheduler wait for a service, and how many others need it."""
        found = self._needed.get(key_of(entry.name, entry.tenant))
        return (0, 0) if found is None else (found.waiting, found.others)

    def _send(self, condition: ServiceChanged) -> None:
        if self._told.get(condition.key) != condition:
            self._told[condition.key] = condition
            self._post([condition])


def _condition(entry: ServiceEntry) -> ServiceChanged:
    machine, key = entry.machine, key_of(entry.name, entry.tenant)
    if machine.takes_requests:
        # A model is reached by gateways from every node.
        is_near = not machine.spec.engine and machine.spec.reach is Reach.NODE
        nodes = frozenset(instance.node_id for instance in machine.ready) if is_near else None
        return ServiceChanged(key, is_ready=True, nodes=nodes)
    if machine.state is ServiceState.FAILED and machine.starts.given_up is not None:
        text = f"service {entry.name!r} cannot start: {machine.starts.given_up.message}"
        return ServiceChanged(key, failure=Failure(FailureKind.SERVICE_FAILED, text))
    return ServiceChanged(key, detail=f"it is {machine.state.value}")
