"""Serves `WorkerService`. Rule: the error of a stream is sent as `Close`, since grpcio may lose the status of a stream
while the peer writes."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from functools import partial

import grpc
from google.protobuf.message import DecodeError
from lattice.v1 import worker_pb2, worker_pb2_grpc

from lattice_server.config import ServerConfig
from lattice_server.core import messages
from lattice_server.core.errors import LatticeError
from lattice_server.core.model import Failure, FailureKind, TaskSpec
from lattice_server.engine.bus import MessageBus
from lattice_server.engine.ports import OnRunners
from lattice_server.engine.workers.artifact_transfer import Transfers
from lattice_server.engine.workers.outbox import Connection
from lattice_server.engine.workers.sessions import Sessions
from lattice_server.engine.workers.spans import SpanSink
from lattice_server.rpc import callers
from lattice_server.rpc.assigned_artifacts import AssignedArtifacts
from lattice_server.rpc.callers import Caller, no_longer_valid
from lattice_server.rpc.convert.workers import hello_to_event
from lattice_server.rpc.handlers import PEER_END_S, Context, OnError, ignore
from lattice_server.rpc.machines import Machines
from lattice_server.rpc.request_deserializer import unreadable
from lattice_server.rpc.spec_parser import SpecParser
from lattice_server.rpc.worker_admission import WorkerAdmission, protocol_error
from lattice_server.rpc.worker_messages import responses
from lattice_server.rpc.worker_reader import WorkerReader, note_time

Requests = AsyncIterator[worker_pb2.ConnectRequest]


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """The `WorkerService`."""

    def __init__(
        self,
        config: ServerConfig,
        bus: MessageBus,
        sessions: Sessions,
        parser: SpecParser,
        transfers: Transfers,
        machines: Machines,
        assigned: AssignedArtifacts,
        server_id: str,
        check_possible: Callable[[Sequence[TaskSpec]], None],
        restored: Callable[[], Awaitable[None]],
        spans: SpanSink | None = None,
    ) -> None:
        self._config = config
        self._bus = bus
        self._sessions = sessions
        sessions.on_detached = self._detached
        self._transfers = transfers
        self._machines = machines
        self._assigned = assigned
        self._server_id = server_id
        self._restored = restored
        self._admission = WorkerAdmission(sessions, machines)
        limits = config.question_limit_bytes, config.chunk_limit_bytes
        self._on_error: OnError = ignore
        self._reader = WorkerReader(bus, sessions, parser, assigned, *limits, check_possible, spans)

    def observe(self, on_runners: OnRunners, on_error: OnError) -> None:
        """Have observers told of the counts of workers, and of the reasons of refused streams."""
        self._reader.on_runners, self._on_error = on_runners, on_error

    def close_all(self) -> None:
        """Close every worker's stream because the server stops, and refuse new ones."""
        self._admission.stop()
        self._sessions.close_all()

    async def Connect(self, request_iterator: Requests, context: Context) -> AsyncIterator[worker_pb2.ConnectResponse]:
        """Serve the stream of a worker or a machine."""
        requests = aiter(request_iterator)
        is_local = context.peer().startswith("unix:")
        refusal: worker_pb2.Close | None
        try:
            first = await anext(requests, None)
        except DecodeError as error:
            first, refusal = worker_pb2.ConnectRequest(), protocol_error(unreadable(error))
        else:
            if first is None:
                return
            # The leases that a worker holds are compared with those of all runs.
            with contextlib.suppress(LatticeError):
                await self._restored()
            refusal = self._admission.refusal(first, is_local=is_local)
        if refusal is not None:
            self._on_error(worker_pb2.CloseReason.Name(refusal.reason).removeprefix("CLOSE_REASON_"))
            yield worker_pb2.ConnectResponse(close=refusal)
            await _drain(requests)
            return
        is_machine = first.HasField("join")
        served = (
            self._machines.serve(first.join, requests) if is_machine else self._serve(first.hello, requests, is_local)
        )
        async with contextlib.aclosing(served):
            async for response in served:
                yield response

    async def UploadArtifact(
        self, request_iterator: AsyncIterator[worker_pb2.UploadArtifactRequest], context: Context
    ) -> worker_pb2.UploadArtifactResponse:
        """Receive an artifact that the server asked a node for."""
        requests = aiter(request_iterator)
        first = await anext(requests, worker_pb2.UploadArtifactRequest())
        size_bytes = first.size_bytes if first.HasField("size_bytes") else None
        await self._transfers.take(first.transfer_id, size_bytes, _chunks(requests))
        return worker_pb2.UploadArtifactResponse()

    async def _serve(
        self, hello: worker_pb2.Hello, requests: Requests, is_local: bool
    ) -> AsyncGenerator[worker_pb2.ConnectResponse]:
        caller = callers.caller()
        connection = _connection(hello, caller, is_local)
        self._sessions.greet(connection)
        self._bus.post([hello_to_event(hello, connection.greeting)])
        reading = asyncio.create_task(self._reader.read(requests, connection))
        end = partial(connection.send, messages.CloseSession("", "UNAUTHENTICATED", no_longer_valid().message))
        caller.ends.add(end)
        try:
            while not connection.is_closed:
                effects = await connection.next_effects()
                if connection.session is not None and not caller.is_trusted:
                    leases = [effect for effect in effects if isinstance(effect, messages.Assign)]
                    self._assigned.assign(connection.session, leases)
                for response in responses(effects, connection, self._config, self._server_id, self._too_large):
                    yield response
                    if response.HasField("close"):
                        connection.is_closed = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PEER_END_S):
                    await asyncio.shield(reading)
        finally:
            caller.ends.discard(end)
            reading.cancel()
            self._sessions.leave(connection)

    def _too_large(self, effect: messages.Assign, why: str) -> None:
        # A batch is halved when its worker crashes, and a half may fit. A single task never will.
        kind = FailureKind.CRASHED if len(effect.attempts) > 1 else FailureKind.PAYLOAD
        self._bus.post([messages.AttemptFailed(effect.session_id, effect.lease_id, 0, Failure(kind, why))])

    def _detached(self, session_id: str, silent_s: float) -> None:
        self._bus.post([messages.WorkerDetached(session_id, silent_s)])


def _connection(hello: worker_pb2.Hello, caller: Caller, is_local: bool) -> Connection:
    """Return the connection of a worker; one that comes by the server's own socket shares its store of artifacts."""
    connection = Connection(hello.worker_id, hello.node_id, is_local)
    connection.subject = caller.subject
    connection.stored = tuple(hello.stored_artifact_ids)
    connection.reported = tuple(hello.reported_artifact_ids)
    note_time(connection, hello)
    if (task := asyncio.current_task()) is not None:
        connection.abort = task.cancel
    return connection


async def _chunks(requests: AsyncIterator[worker_pb2.UploadArtifactRequest]) -> AsyncIterator[bytes | None]:
    async for request in requests:
        yield None if request.not_found else request.data


async def _drain(requests: Requests) -> None:
    with contextlib.suppress(TimeoutError, grpc.RpcError, DecodeError):
        async with asyncio.timeout(PEER_END_S):
            async for _ in requests:
                pass
