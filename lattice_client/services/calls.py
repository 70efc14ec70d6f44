"""Owns the calls of `ServicesService`. Rule: a repeated call changes nothing more."""

from collections.abc import AsyncIterator
from typing import Any, Unpack
from uuid import uuid4

from lattice.v1 import service_pb2

from lattice_client import errors
from lattice_client.runs.paging import PAGE_SIZE, pages
from lattice_client.runs.tracebacks import shorten
from lattice_client.services.spec import Program, ServiceSettings, spec_of
from lattice_client.transport.channel import Channel
from lattice_client.transport.requests import duration, made

# One call waits no longer than this; the server's limit is 5 minutes.
CALL_S = 240.0
WAITING = frozenset({service_pb2.SERVICE_STATE_STARTING, service_pb2.SERVICE_STATE_IDLE})
UNREADY = WAITING | {service_pb2.SERVICE_STATE_FAILED}
# The server starts a program again after one of these failures; its caller gets the error before that.
OWN_FAILURES = frozenset(
    {
        service_pb2.SERVICE_FAILURE_KIND_EXITED,
        service_pb2.SERVICE_FAILURE_KIND_SIGNALED,
        service_pb2.SERVICE_FAILURE_KIND_OUT_OF_MEMORY,
        service_pb2.SERVICE_FAILURE_KIND_OUT_OF_GPU_MEMORY,
    }
)


@shorten
class AsyncServices:
    """The services of a server, as `AsyncLatticeClient.services`."""

    def __init__(self, channel: Channel) -> None:
        self._rpc = channel

    async def start(
        self,
        name: str,
        program: Program,
        *,
        wait: bool = True,
        timeout: float | None = None,
        **settings: Unpack[ServiceSettings],
    ) -> service_pb2.Service:
        """Start a service, or give the service of this name another definition.

        Args:
            name: 1 to 63 lower-case letters, digits and hyphens.
            program: a command, as a text or a list, in which `{host}` and `{port}` are replaced by the address at which
                it has to listen; or a function that is called with `host` and `port` and serves there until it is
                stopped.
            wait: whether to wait until an instance is ready.
            timeout: seconds to wait at most.
            settings: see `ServiceSettings`.

        Raises:
            TaskDefinitionError: a setting is wrong; nothing was sent.
            ServiceFailedError: its instances cannot start, or the program of the first one has ended by itself; the
                error has its last lines. After the first end the server tries again, for which `ready` waits.
            TimeoutError: no instance was ready in time; the service continues to start.
            RequestError: the server refused it.
        """
        spec, bundle = spec_of(name, program, settings)
        return await self.send(spec, bundle, wait=wait, timeout=timeout)

    async def send(
        self, spec: service_pb2.ServiceSpec, bundle: object = None, *, wait: bool, timeout: float | None
    ) -> service_pb2.Service:
        """Start a service by its definition; see `start`."""
        request = made(service_pb2.StartServiceRequest, spec=spec, bundle=bundle, request_id=uuid4().hex)
        return await self._start(self._rpc.services.StartService, request, wait=wait, timeout=timeout)

    async def _start(self, call: Any, request: Any, *, wait: bool, timeout: float | None) -> service_pb2.Service:
        """Make the call that starts a service; see `start`."""
        ends_at = None if timeout is None else self._rpc.now() + timeout
        if wait:
            request.wait.CopyFrom(duration(CALL_S if timeout is None else max(0.0, min(CALL_S, timeout))))
        found: service_pb2.Service = (await self._rpc.call(call, request)).service
        if not wait or found.state not in UNREADY:
            return found
        if found.state == service_pb2.SERVICE_STATE_FAILED:
            raise failed(found)
        if found.failure.kind in OWN_FAILURES:
            raise failed(found, f"; the server tries again, and services.ready({found.spec.name!r}) waits for that")
        return await self._ready(found.spec.name, ends_at, timeout)

    async def ready(self, name: str, timeout: float | None = None) -> service_pb2.Service:
        """Wait until a service has an instance that is ready; an idle service starts one.

        Raises NotFoundError, ServiceFailedError, TimeoutError.
        """
        return await self._ready(name, None if timeout is None else self._rpc.now() + timeout, timeout)

    async def _ready(self, name: str, ends_at: float | None, timeout: float | None) -> service_pb2.Service:
        while True:
            left_s = CALL_S if ends_at is None else max(0.0, min(CALL_S, ends_at - self._rpc.now()))
            request = made(service_pb2.GetServiceRequest, name=name, wait=duration(left_s))
            found = (await self._rpc.call(self._rpc.services.GetService, request)).service
            if found.state == service_pb2.SERVICE_STATE_FAILED:
                raise failed(found)
            if found.state not in WAITING:
                return found
            if ends_at is not None and self._rpc.now() >= ends_at:
                why = "".join(f": {one.detail}" for one in found.instances[:1] if one.detail)
                raise TimeoutError(f"service {name!r} was not ready within {timeout:g} s{why}; it continues to start")

    async def get(self, name: str) -> service_pb2.Service:
        """Return a service as it is. Raises NotFoundError."""
        request = made(service_pb2.GetServiceRequest, name=name)
        return (await self._rpc.call(self._rpc.services.GetService, request)).service

    async def list(self) -> list[service_pb2.Service]:
        """Return the services, by name."""
        request = service_pb2.ListServicesRequest(page_size=PAGE_SIZE)
        found = pages(self._rpc, self._rpc.services.ListServices, request)
        return [service async for page in found for service in page.services]

    async def scale(
        self, name: str, replicas: int | None = None, max_replicas: int | None = None
    ) -> service_pb2.Service:
        """Change how many instances a service has. Raises NotFoundError, InvalidArgumentError."""
        request = made(
            service_pb2.ScaleServiceRequest,
            name=name,
            replicas=replicas,
            max_replicas=max_replicas,
            request_id=uuid4().hex,
        )
        return (await self._rpc.call(self._rpc.services.ScaleService, request)).service

    async def stop(self, name: str, *, timeout: float | None = None) -> None:
        """Stop a service, and wait until none of its processes is left; a service that does not exist is stopped.

        Raises TimeoutError when that takes longer than `timeout` seconds; the service continues to stop.
        """
        ends_at = None if timeout is None else self._rpc.now() + timeout
        while True:
            left_s = CALL_S if ends_at is None else max(0.0, min(CALL_S, ends_at - self._rpc.now()))
            request = made(service_pb2.StopServiceRequest, name=name, wait=duration(left_s), request_id=uuid4().hex)
            if (await self._rpc.call(self._rpc.services.StopService, request)).stopped:
                return
            if ends_at is not None and self._rpc.now() >= ends_at:
                raise TimeoutError(f"service {name!r} has not ended within {timeout:g} s; it continues to stop")

    async def logs(
        self, name: str, *, instance: str = "", follow: bool = False
    ) -> AsyncIterator[service_pb2.ServiceLogLine]:
        """Yield the lines that the instances of a service wrote; with `follow` also later ones, to the service's end.

        Raises NotFoundError.
        """
        after = 0
        while True:
            wait = duration(CALL_S if follow else 0.0)
            request = made(service_pb2.ReadServiceLogsRequest, name=name, instance_id=instance, after=after, wait=wait)
            try:
                found = await self._rpc.call(self._rpc.services.ReadServiceLogs, request)
            except errors.NotFoundError:
                if after:  # It ended after its last line was read.
                    return
                raise
            for line in found.lines:
                yield line
            after = found.last
            if found.ended or (not found.lines and not follow):
                return


def failed(service: service_pb2.Service, note: str = "") -> errors.ServiceFailedError:
    """Return the error of a service whose instances cannot start."""
    failure = service.failure
    kind = service_pb2.ServiceFailureKind.Name(failure.kind).removeprefix("SERVICE_FAILURE_KIND_").lower()
    return errors.ServiceFailedError(service.spec.name, kind, f"{failure.message}{note}", tuple(failure.last_lines))
