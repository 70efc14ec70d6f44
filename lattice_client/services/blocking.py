"""Owns the calls of services for the synchronous client. Rule: each runs the coroutine of the asyncio client."""

from builtins import list as List
from collections.abc import Iterator
from typing import Unpack

from lattice.v1 import service_pb2

from lattice_client.runs.driver import blocking
from lattice_client.services.calls import AsyncServices
from lattice_client.services.spec import Program, ServiceSettings

_END = object()


class Services:
    """The services of a server, as `LatticeClient.services`; `AsyncServices` documents the methods."""

    def __init__(self, twin: AsyncServices) -> None:
        self._twin = twin

    def start(
        self,
        name: str,
        program: Program,
        *,
        wait: bool = True,
        timeout: float | None = None,
        **settings: Unpack[ServiceSettings],
    ) -> service_pb2.Service:
        """Start a service, or give the service of this name another definition."""
        return blocking(self._twin.start(name, program, wait=wait, timeout=timeout, **settings))

    def ready(self, name: str, timeout: float | None = None) -> service_pb2.Service:
        """Wait until a service has an instance that is ready."""
        return blocking(self._twin.ready(name, timeout))

    def get(self, name: str) -> service_pb2.Service:
        """Return a service as it is."""
        return blocking(self._twin.get(name))

    def list(self) -> List[service_pb2.Service]:
        """Return the services, by name."""
        return blocking(self._twin.list())

    def scale(self, name: str, replicas: int | None = None, max_replicas: int | None = None) -> service_pb2.Service:
        """Change how many instances a service has."""
        return blocking(self._twin.scale(name, replicas, max_replicas))

    def stop(self, name: str, *, timeout: float | None = None) -> None:
        """Stop a service, and wait until none of its processes is left."""
        blocking(self._twin.stop(name, timeout=timeout))

    def logs(self, name: str, *, instance: str = "", follow: bool = False) -> Iterator[service_pb2.ServiceLogLine]:
        """Yield the lines that the instances of a service wrote."""
        lines = self._twin.logs(name, instance=instance, follow=follow)

        async def step() -> object:
            return await anext(lines, _END)

        while isinstance(line := blocking(step()), service_pb2.ServiceLogLine):
            yield line
