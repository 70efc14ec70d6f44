"""Counts the starts and failures of instances of services, and the requests of gateways, on the main thread."""

from lattice_server.core.services.messages import Event, InstanceEnded, InstanceReady
from lattice_server.engine.services.entry import ServiceEntry
from lattice_server.telemetry import catalogue
from lattice_server.telemetry.meters import OTHER, Counter, Histogram, Names, Reading


class ServiceMeter:
    """An observer of services."""

    def __init__(self) -> None:
        self._names = Names()
        self._start_duration, self._restarts = Histogram(catalogue.INSTANCE_START), Counter(catalogue.RESTARTS)
        self._requests = Counter(catalogue.GATEWAY_REQUESTS)
        self._request_duration = Histogram(catalogue.GATEWAY_DURATION)

    def note(self, service: ServiceEntry, event: Event, now: float) -> None:
        """Count an event; see `ServiceObserver`."""
        machine = service.machine
        match event:
            case InstanceReady():
                instance = machine.instances.get(event.instance_id)
                if instance is not None and instance.ready_at == now:
                    start = "cold" if len(machine.ready) == 1 else "warm"
                    self._start_duration.record(now - instance.queued_at, self._names.bounded(service.name), start)
            case InstanceEnded():
                ended = machine.last_ended
                if ended is not None and ended.instance_id == event.instance_id and ended.failure is not None:
                    self._restarts.add(self._names.bounded(service.name), ended.failure.kind.value)
            case _:
                pass

    def note_request(self, service: str, status: int, duration_s: float) -> None:
        """Count a request; see `ServiceObserver`."""
        name = self._names.bounded(service) if service else ""
        self._requests.add(name, str(status) if 100 <= status <= 599 else OTHER)
        self._request_duration.record(duration_s, name)

    def read(self) -> list[Reading]:
        """Return all numbers."""
        meters = (self._start_duration, self._restarts, self._requests, self._request_duration)
        return [meter.read() for meter in meters]
