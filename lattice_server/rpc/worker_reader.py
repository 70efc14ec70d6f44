"""Reads the streams of workers. Rule: each report becomes at most one event, in the order of its number."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence

import grpc
from google.protobuf.message import DecodeError
from lattice.v1 import worker_pb2

from lattice_server.core import messages
from lattice_server.core.errors import InvalidError, LatticeError
from lattice_server.core.messages import AnswerQuestion, AttemptAsked
from lattice_server.core.model import Artifact, Failure, FailureKind, Function, TaskSpec
from lattice_server.engine.bus import MessageBus
from lattice_server.engine.ports import OnRunners
from lattice_server.engine.workers.outbox import Connection, Session
from lattice_server.engine.workers.sessions import Sessions
from lattice_server.engine.workers.spans import SpanSink
from lattice_server.rpc.assigned_artifacts import AssignedArtifacts
from lattice_server.rpc.convert.payloads import question_from_proto
from lattice_server.rpc.convert.resources import ISOLATION_FROM_PROTO
from lattice_server.rpc.convert.spans import spans_from_proto
from lattice_server.rpc.convert.streams import progressed_event, streamed_event
from lattice_server.rpc.convert.times import drain_deadline_from_proto, seconds_from
from lattice_server.rpc.convert.workers import artifacts_in_report, report_to_event
from lattice_server.rpc.handlers import PEER_END_S
from lattice_server.rpc.hello_validation import check_heartbeat
from lattice_server.rpc.request_deserializer import unreadable
from lattice_server.rpc.spec_parser import SpecParser

log = logging.getLogger(__name__)

MAX_DURATIONS = 1000  # Of one level in one heartbeat.


class WorkerReader:
    """Turns the messages of workers into events of the scheduler; one serves all streams.

    `check_possible` raises LatticeError for tasks that no node can run. `spans` takes the spans of tasks, if any.
    """

    def __init__(
        self,
        bus: MessageBus,
        sessions: Sessions,
        parser: SpecParser,
        assigned: AssignedArtifacts,
        question_limit_bytes: int,
        chunk_limit_bytes: int,
        check_possible: Callable[[Sequence[TaskSpec]], None],
        spans: SpanSink | None = None,
    ) -> None:
        self._bus = bus
        self._sessions = sessions
        self._parser = parser
        self._assigned = assigned
        self._question_limit_bytes = question_limit_bytes
        self._chunk_limit_bytes = chunk_limit_bytes
        self._check_possible = check_possible
        self._spans = spans
        self.on_runners: OnRunners | None = None

    async def read(self, requests: AsyncIterator[worker_pb2.ConnectRequest], connection: Connection) -> None:
        """Read a stream to its end, then close the connection."""
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
                    # A lease refers to its function; a digest that is not found belongs to no lease any more.
                    if isinstance(function := self._parser.code.find(digest), Function):
                        connection.send_code(function)
                if request.HasField("draining"):
                    deadline_s = drain_deadline_from_proto(request.draining)
                    self._bus.post([messages.DrainRequested(connection.node_id, deadline_s)])
        except grpc.RpcError as error:
            log.debug("the stream broke: %s", error, extra=connection.named)
        except (DecodeError, InvalidError) as error:
            text = error.message if isinstance(error, InvalidError) else unreadable(error).message
            connection.send(messages.CloseSession("", "PROTOCOL_ERROR", text))
            # Nothing more is read; the worker ends the stream once it has read the reason.
            await asyncio.sleep(PEER_END_S)
        finally:
            connection.close()

    def _take_reports(self, reports: Sequence[worker_pb2.Report], session: Session, connection: Connection) -> None:
        events: list[messages.SchedulerEvent] = []
        artifacts: list[Artifact] = []
        if reports[-1].HasField("time"):
            connection.clock.note(seconds_from(reports[-1].time), connection.heard_at)
        for report in reports:
            is_news = session.is_news(report.sequence)
            if report.sequence <= session.last_sequence:
                # Repeated reports count as well: the message that drops their artifacts may have been lost.
                artifacts += artifacts_in_report(report)
            if is_news:
                events += self._events_or_failure(report, session.session_id, connection)
        if artifacts:
            events.append(messages.ArtifactsReported(tuple(artifacts)))
        events.append(messages.ReportsRead(session.session_id, session.last_sequence))
        self._bus.post(events)

    def _take_spans(self, report: worker_pb2.Report, session_id: str, connection: Connection) -> None:
        if self._spans is None:
            return
        ahead_s = 0.0
        if report.HasField("time"):
            time_s = seconds_from(report.time)
            connection.clock.note(time_s, connection.heard_at)
            ahead_s = time_s - connection.clock.at(time_s) - (time.time() - time.monotonic())
        spans = spans_from_proto(report.traced, int(ahead_s * 1e9))
        self._spans.take_spans(session_id, report.lease_id, report.item, spans)

    def _events_or_failure(
        self, report: worker_pb2.Report, session_id: str, connection: Connection
    ) -> list[messages.SchedulerEvent]:
        """Return the events of a report. One that cannot be taken ends its lease, or it would be repeated for ever."""
        try:
            return self._events_of(report, session_id, connection)
        except LatticeError:
            raise
        except Exception as error:
            log.exception("a report cannot be taken", extra={**connection.named, "lease_id": report.lease_id})
            failure = Failure(FailureKind.INTERNAL, f"a report of its worker cannot be taken: {error!r}")
            return [messages.AttemptFailed(session_id, report.lease_id, report.item, failure)]

    def _events_of(
        self, report: worker_pb2.Report, session_id: str, connection: Connection
    ) -> list[messages.SchedulerEvent]:
        match report.WhichOneof("fact"):
            case "spawned":
                return [self._spawned_event(report, session_id)]
            case "asked":
                return self._asked_events(report, session_id)
            case "traced":
                self._take_spans(report, session_id, connection)
                return []
            case "streamed":
                return [streamed_event(report, session_id, self._chunk_limit_bytes)]
            case "progressed":
                event: messages.SchedulerEvent | None = progressed_event(report, session_id)
            case _:
                event = report_to_event(report, session_id, connection.clock)
        return [] if event is None else [event]

    def _take_heartbeat(self, heartbeat: worker_pb2.Heartbeat, session: Session) -> None:
        check_heartbeat(heartbeat)
        held = frozenset(heartbeat.held_lease_ids)
        self._assigned.release(session, held, heartbeat.assignment_sequence)
        session.runners = {}
        for count in heartbeat.runners:
            if (level := ISOLATION_FROM_PROTO.get(count.isolation)) is not None:
                session.runners[level] = max(0, count.busy), max(0, count.idle)
                if self.on_runners is not None:
                    starts = [seconds_from(duration) for duration in count.start_durations[:MAX_DURATIONS]]
                    self.on_runners(level.value, max(0, count.started), max(0, count.waited), starts)
        self._bus.post([messages.WorkerHeartbeat(session.session_id, held, heartbeat.assignment_sequence)])

    def _spawned_event(self, report: worker_pb2.Report, session_id: str) -> messages.AttemptSpawned:
        named = (session_id, report.lease_id, report.item)
        try:
            functions = self._parser.spawned_functions(report.spawned.functions)
            tasks = self._parser.tasks(report.spawned.tasks, functions)
            self._check_possible(tasks)
            return messages.AttemptSpawned(*named, tasks, is_called=report.spawned.called)
        except LatticeError as error:
            is_impossible = error.reason == "UNSATISFIABLE_RESOURCES"
            kind = FailureKind.RESOURCES if is_impossible else FailureKind.PAYLOAD
            refusal = Failure(kind, f"the spawned tasks cannot be added: {error.message}")
            return messages.AttemptSpawned(*named, (), refusal)

    def _asked_events(self, report: worker_pb2.Report, session_id: str) -> list[messages.SchedulerEvent]:
        """Return the event of a question; one that cannot be asked is answered at once and has no event."""
        asked = report.asked
        try:
            name, payload = asked.name, question_from_proto(asked.payload, self._question_limit_bytes)
        except LatticeError as error:
            text = f"the question cannot be put to the caller: {error.message}"
            self._sessions.perform(AnswerQuestion(session_id, report.lease_id, asked.number, text))
            return []
        return [AttemptAsked(session_id, report.lease_id, report.item, asked.number, name, payload)]


def note_time(connection: Connection, message: worker_pb2.Hello | worker_pb2.Heartbeat) -> None:
    """Compare the clocks by the send time of a message."""
    if message.HasField("send_time"):
        connection.clock.note(seconds_from(message.send_time), connection.heard_at)
