"""Serves `ServicesService`."""

import asyncio
import contextlib
import hashlib
import time

from lattice.v1 import service_pb2, service_pb2_grpc

from lattice_server.core.errors import invalid_field
from lattice_server.core.model import Bundle
from lattice_server.core.tenancy import Reach
from lattice_server.engine.services.services import Services
from lattice_server.engine.stores.code_store import CodeStore
from lattice_server.rpc import callers
from lattice_server.rpc.convert.functions import bundle_from_proto
from lattice_server.rpc.convert.services import check_replicas, line_to_proto, service_to_proto, spec_from_proto
from lattice_server.rpc.convert.times import wait_from_proto
from lattice_server.rpc.handlers import Context
from lattice_server.rpc.paging import number_after, page
from lattice_server.rpc.request_cache import RequestCache

LOG_PAGE_BYTES = 256 * 1024


class ServicesServicer(service_pb2_grpc.ServicesServiceServicer):
    """The `ServicesService`."""

    def __init__(self, services: Services, code: CodeStore, cache: RequestCache) -> None:
        self._services = services
        self._code = code
        self._cache = cache

    async def StartService(
        self, request: service_pb2.StartServiceRequest, context: Context
    ) -> service_pb2.StartServiceResponse:
        """Start a service, or replace its definition."""
        wait_s = wait_from_proto(request.wait, "wait")

        async def start() -> service_pb2.StartServiceResponse:
            spec = spec_from_proto(request.spec)
            tenant = callers.tenant_named(request.tenant)
            bundle = self._bundle(request, spec.bundle, Reach(tenant, callers.reach().is_any))
            entry, changed = self._services.start(spec, tenant, bundle)
            await self._services.wait_started(entry, wait_s)
            return service_pb2.StartServiceResponse(service=service_to_proto(entry), changed=changed)

        return await self._cache.once(request, start)

    def _bundle(self, request: service_pb2.StartServiceRequest, digest: str, reach: Reach) -> Bundle | None:
        """Store and return the modules of a function. Raises InvalidError, and as `CodeStore`."""
        if request.HasField("bundle") and request.bundle.zip:
            made = f"sha256:{hashlib.sha256(request.bundle.zip).hexdigest()}"
            if request.bundle.digest != made:
                raise invalid_field("bundle.digest", f"must be that of `zip`, {made}")
            self._code.put(bundle_from_proto(request.bundle), reach.tenant)
        return self._code.get(digest, reach) if digest else None

    async def GetService(
        self, request: service_pb2.GetServiceRequest, context: Context
    ) -> service_pb2.GetServiceResponse:
        """Return one service."""
        entry = self._services.get(request.name, callers.reach())
        await self._services.wait(entry, wait_from_proto(request.wait, "wait"))
        return service_pb2.GetServiceResponse(service=service_to_proto(entry))

    async def ListServices(
        self, request: service_pb2.ListServicesRequest, context: Context
    ) -> service_pb2.ListServicesResponse:
        """List the services of the tenant."""
        start = number_after(request) or 0
        found = enumerate(self._services.within(callers.reach()), 1)
        rows = ((number, entry) for number, entry in found if number > start)
        services, token = page(request, rows, service_to_proto)
        return service_pb2.ListServicesResponse(services=services, next_page_token=token)

    async def ScaleService(
        self, request: service_pb2.ScaleServiceRequest, context: Context
    ) -> service_pb2.ScaleServiceResponse:
        """Change how many instances a service has."""

        async def scale() -> service_pb2.ScaleServiceResponse:
            entry = self._services.get(request.name, callers.reach())
            spec = entry.machine.spec
            replicas = request.replicas if request.HasField("replicas") else spec.replicas
            kept = max(spec.max_replicas, replicas) if request.HasField("replicas") else spec.max_replicas
            most = request.max_replicas if request.HasField("max_replicas") else kept
            check_replicas(replicas, most, "")
            self._services.scale(entry, replicas, most)
            return service_pb2.ScaleServiceResponse(service=service_to_proto(entry))

        return await self._cache.once(request, scale)

    async def StopService(
        self, request: service_pb2.StopServiceRequest, context: Context
    ) -> service_pb2.StopServiceResponse:
        """Stop a service."""
        wait_s = wait_from_proto(request.wait, "wait")

        async def stop() -> service_pb2.StopServiceResponse:
            entry = self._services.find(request.name, callers.reach())
            if entry is None:
                return service_pb2.StopServiceResponse(stopped=True)
            self._services.stop(entry)
            await self._services.wait_gone(entry, wait_s)
            return service_pb2.StopServiceResponse(stopped=entry.machine.is_gone)

        return await self._cache.once(request, stop)

    async def ReadServiceLogs(
        self, request: service_pb2.ReadServiceLogsRequest, context: Context
    ) -> service_pb2.ReadServiceLogsResponse:
        """Return lines that instances wrote."""
        entry = self._services.get(request.name, callers.reach())
        after = request.after
        if after < 0:
            raise invalid_field("after", "must not be negative")
        wait_s = wait_from_proto(request.wait, "wait")
        deadline = time.monotonic() + wait_s
        lines, last = entry.log.after(after, request.instance_id, LOG_PAGE_BYTES)
        while not lines and not entry.machine.is_gone and (left_s := deadline - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await entry.changed()
            lines, last = entry.log.after(last, request.instance_id, LOG_PAGE_BYTES)
        return service_pb2.ReadServiceLogsResponse(
            lines=map(line_to_proto, lines), last=last, ended=entry.machine.is_gone
        )
