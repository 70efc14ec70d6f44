"""Serves `LlmService`."""

from lattice.v1 import llm_pb2, llm_pb2_grpc

from lattice_server.core.tenancy import Reach
from lattice_server.engine.services.services import Services
from lattice_server.rpc import callers
from lattice_server.rpc.convert.llms import llm_from_proto, with_key
from lattice_server.rpc.convert.services import service_to_proto
from lattice_server.rpc.convert.times import wait_from_proto
from lattice_server.rpc.handlers import Context
from lattice_server.rpc.request_cache import RequestCache


class LlmServicer(llm_pb2_grpc.LlmServiceServicer):
    """The `LlmService`."""

    def __init__(self, services: Services, cache: RequestCache) -> None:
        self._services = services
        self._cache = cache

    async def StartLlm(self, request: llm_pb2.StartLlmRequest, context: Context) -> llm_pb2.StartLlmResponse:
        """Start a model, or replace its definition."""
        wait_s = wait_from_proto(request.wait, "wait")

        async def start() -> llm_pb2.StartLlmResponse:
            tenant = callers.tenant_named(request.tenant)
            earlier = self._services.find(request.spec.name, Reach(tenant))
            spec = with_key(llm_from_proto(request.spec), None if earlier is None else earlier.machine.spec)
            entry, changed = self._services.start(spec, tenant, None)
            await self._services.wait_started(entry, wait_s)
            return llm_pb2.StartLlmResponse(service=service_to_proto(entry), changed=changed)

        return await self._cache.once(request, start)
