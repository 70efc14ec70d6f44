"""Builds the gRPC servers: services, health, reflection, interceptors. Rule: a port belongs to one server."""

import asyncio
import logging
import socket
from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection
from lattice.v1 import (
    artifact_pb2,
    artifact_pb2_grpc,
    cluster_pb2,
    cluster_pb2_grpc,
    llm_pb2,
    llm_pb2_grpc,
    results_pb2,
    results_pb2_grpc,
    service_pb2,
    service_pb2_grpc,
    task_pb2,
    task_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
    workflow_pb2,
    workflow_pb2_grpc,
)

from lattice_server.config import ServerConfig
from lattice_server.engine.slices import Slices
from lattice_server.rpc.artifacts import ArtifactServicer
from lattice_server.rpc.authentication import Authentication, AuthenticationInterceptor, TrustInterceptor
from lattice_server.rpc.certificates import Certificates
from lattice_server.rpc.cluster import ClusterServicer
from lattice_server.rpc.durable_answers import DurableAnswers
from lattice_server.rpc.handlers import OnError, ignore
from lattice_server.rpc.interceptors import ErrorInterceptor
from lattice_server.rpc.llms import LlmServicer
from lattice_server.rpc.request_deserializer import MessageLimits
from lattice_server.rpc.results import ResultsServicer
from lattice_server.rpc.services import ServicesServicer
from lattice_server.rpc.tasks import TaskServicer
from lattice_server.rpc.workers import WorkerServicer
from lattice_server.rpc.workflows import WorkflowServicer

SERVICE_NAMES = (
    workflow_pb2.DESCRIPTOR.services_by_name["WorkflowService"].full_name,
    task_pb2.DESCRIPTOR.services_by_name["TaskService"].full_name,
    results_pb2.DESCRIPTOR.services_by_name["ResultsService"].full_name,
    artifact_pb2.DESCRIPTOR.services_by_name["ArtifactService"].full_name,
    cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"].full_name,
    worker_pb2.DESCRIPTOR.services_by_name["WorkerService"].full_name,
    service_pb2.DESCRIPTOR.services_by_name["ServicesService"].full_name,
    llm_pb2.DESCRIPTOR.services_by_name["LlmService"].full_name,
)
HANDSHAKE_MS = 10_000
# Bounds the memory of one connection. Each open call has a stream; further calls wait, or are refused with UNAVAILABLE
# while others are being closed. So the limit is far above the need of a client.
MAX_STREAMS = 1024
# gRPC refuses headers over the first size at random, more often the longer they are, and over the second always.
METADATA_BYTES, MAX_METADATA_BYTES = 16 * 1024, 32 * 1024
IDLE_MS = 300_000


class _WithoutWhoLeft(logging.Filter):
    """Drops the traceback that grpcio logs for each caller that disconnects during a write."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log a record. The class of the exception is private, so it is compared by name."""
        return record.exc_info is None or getattr(record.exc_info[0], "__name__", "") != "ExecuteBatchError"


logging.getLogger("grpc._cython.cygrpc").addFilter(_WithoutWhoLeft())


class PortInUseError(Exception):
    """Another process listens on the address."""


class RpcServer:
    """The gRPC front; lives on the main thread's event loop.

    Two gRPC servers offer the same services: the one on the network authenticates callers, and the one on the server's
    own socket does not.
    """

    def __init__(
        self,
        config: ServerConfig,
        local_path: str,
        workflows: WorkflowServicer,
        tasks: TaskServicer,
        results: ResultsServicer,
        artifacts: ArtifactServicer,
        cluster: ClusterServicer,
        workers: WorkerServicer,
        services: ServicesServicer,
        llms: LlmServicer,
        authentication: Authentication | None,
        slices: Slices,
        answers: DurableAnswers | None = None,
        observers: Sequence[grpc.aio.ServerInterceptor] = (),
        on_error: OnError = ignore,
    ) -> None:
        self._config = config
        self.local_target = f"unix:{local_path}"
        limits = MessageLimits(config.message_limit_bytes, config.message_limit_tasks)
        # Observers see the status of an error.
        interceptors: list[Any] = [*observers, ErrorInterceptor(limits, slices, answers, on_error)]
        trust = TrustInterceptor()
        guard = trust if authentication is None else AuthenticationInterceptor(authentication, on_error)
        self._workflows = workflows
        self._server = _server(config, [*interceptors, guard])
        self._local_server = _server(config, [*interceptors, trust])
        self.certificates = None if config.tls is None else Certificates(config.tls)
        self._health = health_aio.HealthServicer()
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        for server in (self._server, self._local_server):
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
            workflow_pb2_grpc.add_WorkflowServiceServicer_to_server(workflows, server)
            task_pb2_grpc.add_TaskServiceServicer_to_server(tasks, server)
            results_pb2_grpc.add_ResultsServiceServicer_to_server(results, server)
            artifact_pb2_grpc.add_ArtifactServiceServicer_to_server(artifacts, server)
            cluster_pb2_grpc.add_ClusterServiceServicer_to_server(cluster, server)
            worker_pb2_grpc.add_WorkerServiceServicer_to_server(workers, server)
            service_pb2_grpc.add_ServicesServiceServicer_to_server(services, server)
            llm_pb2_grpc.add_LlmServiceServicer_to_server(llms, server)
            reflection.enable_server_reflection((*SERVICE_NAMES, health_name, reflection.SERVICE_NAME), server)

    async def start(self) -> int:
        """Listen and serve; return the port. Raises PortInUseError."""
        address = self._config.address(self._config.port)
        # gRPC does not say why an address is refused, and logs a line of its own.
        if refusal := _refusal(self._config):
            raise PortInUseError(f"cannot listen on {address}: {refusal}")
        try:
            if self.certificates is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self.certificates.credentials())
        except RuntimeError:
            raise PortInUseError(f"cannot listen on {address}: gRPC refuses the address") from None
        # In a folder that only this user may enter, so it needs neither TLS nor tokens.
        self._local_server.add_insecure_port(self.local_target)
        await self._server.start()
        await self._local_server.start()
        return port

    async def set_serving(self, is_serving: bool) -> None:
        """Tell health checks whether the server takes work."""
        status = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *SERVICE_NAMES):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls and end the running ones within `grace_s` seconds."""
        self._workflows.stop()
        await asyncio.gather(self._server.stop(grace_s), self._local_server.stop(grace_s))


def _server(config: ServerConfig, interceptors: Sequence[Any]) -> grpc.aio.Server:
    return grpc.aio.server(
        interceptors=interceptors,
        options=[
            # Otherwise two servers could share a port, and the kernel would split the connections between them.
            ("grpc.so_reuseport", 0),
            # For the workers' stream: gRPC has one limit for all methods. `RequestDeserializer` has one for callers.
            ("grpc.max_receive_message_length", config.worker_message_limit_bytes),
            ("grpc.max_send_message_length", config.worker_message_limit_bytes),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            # Callers ping every 30 s; more than two pings each sooner than this after the last end a connection.
            ("grpc.http2.min_ping_interval_without_data_ms", int(config.min_ping_interval_s * 1000)),
            # A connection without a handshake holds a descriptor for this long; by default two minutes.
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
            ("grpc.max_concurrent_streams", MAX_STREAMS),
            ("grpc.max_metadata_size", METADATA_BYTES),
            ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
            # For a connection without calls; the caller's next call opens another one.
            ("grpc.max_connection_idle_ms", IDLE_MS),
        ],
    )


def _refusal(config: ServerConfig) -> str:
    """Return why the system refuses the address of a server; empty when it does not."""
    try:
        with socket.create_server((config.host.strip("[]"), config.port), family=_family(config.host)):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
