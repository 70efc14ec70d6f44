"""Serves `WorkerService`: the workers' streams. Rule: a stream's error goes into `Close`, never into its status, which
grpcio may lose while the other side writes."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

import grpc
from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp
from lattice.v1 import run_pb2, worker_pb2, worker_pb2_grpc

from lattice_server.config import ServerConfig
from lattice_server.core import messages
from lattice_server.core.errors import InvalidError, LatticeError
from lattice_server.core.messages import AnswerQuestion, AttemptAsked
from lattice_server.core.model import Artifact, Failure, FailureKind, Function, TaskSpec
from lattice_server.engine.artifact_transfer import Transfers
from lattice_server.engine.bus import MessageBus
from lattice_server.engine.clock_offset import WorkerClock
from lattice_server.engine.outbox import Connection, Session
from lattice_server.engine.sessions import Sessions
from lattice_server.rpc import callers
from lattice_server.rpc.callers import no_longer_valid
from lattice_server.rpc.claims import check_heartbeat
from lattice_server.rpc.context import Context
from lattice_server.rpc.convert import payloads
from lattice_server.rpc.convert.assignments import responses
from lattice_server.rpc.hello_validation import check_first, deadline_from_proto, version_misfit
from lattice_server.rpc.node_join import Machines
from lattice_server.rpc.request_parser import Intake
from lattice_server.rpc.request_reader import unreadable

log = logging.getLogger(__name__)

HANG_UP_S = 2.0
NO_LIMIT = 1 << 62


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """The `WorkerService`."""

    def __init__(
        self,
        config: ServerConfig,
        bus: MessageBus,
        sessions: Sessions,
        intake: Intake,
        transfers: Transfers,
        machines: Machines,
        server_id: str,
        check_possible: Callable[[Sequence[TaskSpec]], None],
    ) -> None:
        self._config = config
        self._bus = bus
        self._sessions = sessions
        sessions.on_detached = self._detached
        self._intake = intake
        self._transfers = transfers
        self._machines = machines
        self._is_stopping = False
        self._server_id = server_id
        self._check_possible = check_possible

    def close_all(self) -> None:
        """Tell every worker that the server stops, and those that dial again as well."""
        self._is_stopping = True
        self._sessions.close_all()

    async def Connect(
        self,
        request_iterator: AsyncIterator[worker_pb2.ConnectRequest],
        context: Context,
    ) -> AsyncIterator[worker_pb2.ConnectResponse]:
        """Serve one worker's stream."""
        requests = aiter(request_iterator)
        # Whoever is beside the head shares its store.
        is_beside = context.peer().startswith("unix:")
        first: worker_pb2.ConnectRequest | None = worker_pb2.ConnectRequest()
        refusal: worker_pb2.Close | None
        try:
            first = await anext(requests, None)
        except DecodeError as error:
            refusal = protocol_error(unreadable(error))
        else:
            refusal = None if first is None else self._refusal(first, is_beside)
        if first is None:
            return
        if refusal is not None:
            yield worker_pb2.ConnectResponse(close=refusal)
            await _drain(requests)
            return
        if first.HasField("join"):
            async with contextlib.aclosing(self._machines.serve(first.join, requests)) as served:
                async for response in served:
                    yield response
            return
        hello = first.hello
        caller = callers.caller()
        connection = Connection(hello.worker_id, hello.node_id, is_beside)
        connection.subject = caller.subject
        connection.stored = tuple(hello.stored_artifact_ids)
        connection.reported = tuple(hello.reported_artifact_ids)
        note_time(connection, hello)
        if (task := asyncio.current_task()) is not None:
            connection.abort = task.cancel
        self._sessions.greet(connection)
        self._bus.post([_hello_event(hello, connection.greeting)])
        reader = asyncio.create_task(self._read(requests, connection))
        ended = partial(connection.send, messages.CloseSession("", "UNAUTHENTICATED", no_longer_valid().message))
        caller.ends.add(ended)
        try:
            while not connection.is_closed:
                effects = await connection.next_effects()
                for response in responses(effects, connection, self._config, self._server_id, self._too_large):
                    yield response
                    if response.HasField("close"):
                        connection.is_closed = True
            with contextlib.suppress(TimeoutError):
                # The worker hangs up when it has read `Close`; ending first could lose it.
                async with asyncio.timeout(HANG_UP_S):
                    await asyncio.shield(reader)
        finally:
            caller.ends.discard(ended)
            reader.cancel()
            self._sessions.leave(connection)

    def _too_large(self, effect: messages.Assign, why: str) -> None:
        # A batch is halved when its worker crashes, and what is left of it may fit; one alone never will.
        kind = FailureKind.CRASHED if len(effect.attempts) > 1 else FailureKind.PAYLOAD
        self._bus.post([messages.AttemptFailed(effect.session_id, effect.lease_id, 0, Failure(kind, why))])

    def _detached(self, session_id: str, silent_s: float) -> None:
        self._bus.post([messages.WorkerDetached(session_id, silent_s)])

    def _refusal(self, first: worker_pb2.ConnectRequest, is_beside: bool) -> worker_pb2.Close | None:
        if (misfit := version_misfit(first)) is not None:
            return misfit
        try:
            check_first(first, is_beside=is_beside)
        except LatticeError as error:
            return protocol_error(error)
        if first.HasField("hello") and self._machines.has_given_up(first.hello.worker_id):
            text = f"worker {first.hello.worker_id} was away for too long, and another is to take its place"
            return worker_pb2.Close(reason=worker_pb2.CLOSE_REASON_LOST, message=text)
        if self._is_stopping:
            return worker_pb2.Close(reason=worker_pb2.CLOSE_REASON_SHUTDOWN, message="the server stops")
        return self._not_its_own(first)

    def _not_its_own(self, first: worker_pb2.ConnectRequest) -> worker_pb2.Close | None:
        """Return the answer to a worker or a machine whose subject may not have the node; None to others.

        A node belongs to the subject that registered it for as long as it is known.
        """
        caller = callers.caller()
        is_worker = first.HasField("hello")
        node_id = first.hello.node_id if is_worker else first.join.node_id
        owners = {self._sessions.owner_of(node_id, first.hello.worker_id), self._machines.owner_of(node_id)}
        if not caller.credential.may_serve(node_id):
            text = f"this token is not for node {node_id!r}"
        elif owners - {None, caller.subject}:
            text = f"node {node_id!r}, or worker {first.hello.worker_id!r}, is another subject's"
        else:
            return None
        log.info("refused node %r to %r: %s", node_id, caller.subject, text)
        return worker_pb2.Close(reason=worker_pb2.CLOSE_REASON_UNAUTHENTICATED, message=text)

    async def _read(self, requests: AsyncIterator[worker_pb2.ConnectRequest], connection: Connection) -> None:
        try:
            async for request in requests:
                connection.heard_at = time.monotonic()
                if (session := connection.session) is None:
                    continue
                if request.reports:
                    self._take_reports(request.reports, session, connection)
                if request.HasField("heartbeat"):
                    note_time(connection, request.heartbeat)
                    self._take_heartbeat(request.heartbeat, session)
                session.acknowledge(request.acknowledged_answer)
                for digest in request.unknown_digests:
                    # A lease refers to its function; a digest that is not found is of no lease any more.
                    if isinstance(function := self._intake.code.find(digest), Function):
                        connection.send_code(function)
                if request.HasField("draining"):
                    deadline_s = deadline_from_proto(request.draining)
                    self._bus.post([messages.DrainRequested(connection.node_id, deadline_s)])
        except grpc.RpcError as error:
            log.debug("the stream broke: %s", error, extra=connection.named)
        except (DecodeError, InvalidError) as error:
            text = error.message if isinstance(error, InvalidError) else unreadable(error).message
            connection.send(messages.CloseSession("", "PROTOCOL_ERROR", text))
            # Nothing more is read; the worker hangs up when it has read why, which ends this.
            await asyncio.sleep(HANG_UP_S)
        finally:
            connection.close()

    def _take_reports(self, reports: Sequence[worker_pb2.Report], session: Session, connection: Connection) -> None:
        events: list[messages.SchedulerEvent] = []
        artifacts: list[Artifact] = []
        if reports[-1].HasField("time"):
            connection.clock.note(seconds_of(reports[-1].time), connection.heard_at)
        for report in reports:
            is_news = session.is_news(report.sequence)
            if report.sequence <= session.last_sequence:
                # Of one that comes again too: that what it names is to be dropped may not have been heard.
                artifacts += payloads.artifacts_in_report(report)
            if is_news:
                fact = report.WhichOneof("fact")
                if fact == "spawned":
                    events.append(self._spawned_event(report, session.session_id))
                elif fact == "asked":
                    events += self._asked_events(report, session.session_id)
                elif (event := _report_event(report, session.session_id, connection.clock)) is not None:
                    events.append(event)
        if artifacts:
            events.append(messages.ArtifactsReported(tuple(artifacts)))
        self._bus.post(events)
        connection.acknowledgement.add(session.last_sequence)

    def _take_heartbeat(self, heartbeat: worker_pb2.Heartbeat, session: Session) -> None:
        check_heartbeat(heartbeat)
        held = frozenset(heartbeat.held_lease_ids)
        self._bus.post([messages.WorkerHeartbeat(session.session_id, held, heartbeat.assignment_sequence)])

    def _spawned_event(self, report: worker_pb2.Report, session_id: str) -> messages.AttemptSpawned:
        named = (session_id, report.lease_id, report.item)
        try:
            functions = self._intake.spawned(report.spawned.functions)
            tasks = self._intake.tasks(report.spawned.tasks, functions)
            self._check_possible(tasks)
            return messages.AttemptSpawned(*named, tasks)
        except LatticeError as error:
            is_impossible = error.reason == "UNSATISFIABLE_RESOURCES"
            kind = FailureKind.RESOURCES if is_impossible else FailureKind.PAYLOAD
            refusal = Failure(kind, f"what it spawned cannot be added: {error.message}")
            return messages.AttemptSpawned(*named, (), refusal)

    def _asked_events(self, report: worker_pb2.Report, session_id: str) -> list[messages.SchedulerEvent]:
        """Return what asks a question; one that cannot be put to a caller is answered at once."""
        asked = report.asked
        try:
            name, payload = asked.name, payloads.question_from_proto(asked.payload, self._config.question_limit_bytes)
        except LatticeError as error:
            text = f"the question cannot be put to the caller: {error.message}"
            self._sessions.perform(AnswerQuestion(session_id, report.lease_id, asked.number, text))
            return []
        return [AttemptAsked(session_id, report.lease_id, report.item, asked.number, name, payload)]

    async def UploadArtifact(
        self, request_iterator: AsyncIterator[worker_pb2.UploadArtifactRequest], context: Context
    ) -> worker_pb2.UploadArtifactResponse:
        """Take an artifact somebody reads from the node that has it."""
        requests = aiter(request_iterator)
        first = await anext(requests, worker_pb2.UploadArtifactRequest())
        size_bytes = first.size_bytes if first.HasField("size_bytes") else None
        await self._transfers.take(first.transfer_id, size_bytes, _chunks(requests))
        return worker_pb2.UploadArtifactResponse()


def protocol_error(error: LatticeError) -> worker_pb2.Close:
    """Return the last word to a worker or a machine that says what it must not."""
    return worker_pb2.Close(reason=worker_pb2.CLOSE_REASON_PROTOCOL_ERROR, message=error.message)


def _hello_event(hello: worker_pb2.Hello, greeting: int) -> messages.WorkerHello:
    return messages.WorkerHello(
        worker_id=hello.worker_id,
        node_id=hello.node_id,
        session_id=hello.session_id,
        held_lease_ids=tuple(hello.held_lease_ids),
        hostname=hello.hostname,
        node_ip=hello.node_ip,
        capacity=payloads.capacity_from_proto(hello.capacity),
        labels=dict(hello.labels),
        isolations=frozenset(
            payloads.ISOLATION_FROM_PROTO[level] for level in hello.isolations if level in payloads.ISOLATION_FROM_PROTO
        ),
        runtime=payloads.runtime_from_proto(hello.runtime),
        pid=hello.pid,
        entrypoints=frozenset(hello.entrypoints),
        greeting=greeting,
    )


def note_time(connection: Connection, message: worker_pb2.Hello | worker_pb2.Heartbeat) -> None:
    """Have the clocks compared by when a message was sent."""
    if message.HasField("send_time"):
        connection.clock.note(seconds_of(message.send_time), connection.heard_at)


def seconds_of(time: Timestamp) -> float:
    """Return a time in seconds since the epoch."""
    return time.seconds + time.nanos / 1e9


def _report_event(report: worker_pb2.Report, session_id: str, clock: WorkerClock) -> messages.SchedulerEvent | None:
    named = (session_id, report.lease_id, report.item)
    at = clock.at(seconds_of(report.time)) if report.HasField("time") else None
    match report.WhichOneof("fact"):
        case "succeeded":
            try:
                return _success_event(report.succeeded, named, at)
            except InvalidError as error:
                # Its sequence number is taken: what it means must not get lost, nor what came with it.
                text = f"the worker reported a success that cannot be read: {error.message}"
                return messages.AttemptFailed(*named, Failure(FailureKind.PAYLOAD, text), at=at)
        case "started":
            return messages.AttemptStarted(*named, at)
        case "failed":
            failure = payloads.failure_from_proto(report.failed.failure)
            return messages.AttemptFailed(*named, failure, payloads.seconds_from(report.failed.duration), at)
        case "log":
            written = report.log
            is_error = written.stream == run_pb2.LOG_STREAM_STDERR
            return messages.AttemptLogged(*named, is_error, written.text, written.truncated)
        case "returned":
            return messages.LeaseReturned(session_id, report.lease_id, report.returned.reason)
        case _:
            return None


def _success_event(
    succeeded: worker_pb2.AttemptSucceeded, named: tuple[str, str, int], at: float | None
) -> messages.AttemptSucceeded:
    outputs = {
        name: payloads.payload_from_proto(payload, f'outputs["{name}"]', NO_LIMIT)
        for name, payload in succeeded.outputs.items()
    }
    split = {
        name: [payloads.payload_from_proto(item, f'split["{name}"]', NO_LIMIT) for item in items.items]
        for name, items in succeeded.split.items()
    }
    return messages.AttemptSucceeded(*named, outputs, payloads.seconds_from(succeeded.duration), split, at)


async def _chunks(requests: AsyncIterator[worker_pb2.UploadArtifactRequest]) -> AsyncIterator[bytes | None]:
    async for request in requests:
        yield None if request.not_found else request.data


async def _drain(requests: AsyncIterator[worker_pb2.ConnectRequest]) -> None:
    with contextlib.suppress(TimeoutError, grpc.RpcError, DecodeError):
        async with asyncio.timeout(HANG_UP_S):
            async for _ in requests:
                pass
