"""Owns how effects become messages to a worker. Rule: everything that waits goes out coalesced; code travels once."""

from collections.abc import Callable, Iterator
from typing import assert_never

from lattice.v1 import task_pb2, worker_pb2

from lattice_server.config import ServerConfig
from lattice_server.core.messages import (
    Assign,
    CloseSession,
    DrainWorker,
    DropArtifact,
    RevokeLease,
    SendArtifact,
    StopLease,
    ToSession,
    WelcomeWorker,
)
from lattice_server.engine.sessions import Connection
from lattice_server.rpc import convert
from lattice_server.rpc.definitions import code_to_proto
from lattice_server.rpc.parts import ENVELOPE_BYTES, PART_BYTES

WORKER_LIMIT_BYTES = 256 * 1024 * 1024  # What every worker takes.


def responses(
    effects: list[WelcomeWorker | ToSession],
    connection: Connection,
    config: ServerConfig,
    server_id: str,
    too_large: Callable[[Assign, str], None],
) -> Iterator[worker_pb2.ConnectResponse]:
    """Yield the messages that carry `effects`, in an order that keeps the effects' meaning.

    `too_large` is told each lease that no message can carry, and why.
    """
    work = _Work(connection, config)
    stopped: list[str] = []
    revoked: list[str] = []
    dropped: list[str] = []
    close: worker_pb2.Close | None = None
    for effect in effects:
        match effect:
            case Assign():
                if excess := work.add(effect):
                    too_large(effect, excess)
            case StopLease():
                stopped.append(effect.lease_id)
            case RevokeLease():
                revoked.append(effect.lease_id)
            case WelcomeWorker():
                yield worker_pb2.ConnectResponse(welcome=_welcome(effect, config, server_id))
            case DrainWorker():
                deadline = None if effect.deadline_s is None else convert.duration(effect.deadline_s)
                yield worker_pb2.ConnectResponse(drain=worker_pb2.Drain(deadline=deadline))
            case SendArtifact():
                wanted = worker_pb2.SendArtifact(
                    transfer_id=effect.transfer_id, artifact_id=effect.artifact_id, offset=effect.offset
                )
                yield worker_pb2.ConnectResponse(send_artifact=wanted)
            case DropArtifact():
                dropped.append(effect.artifact_id)
            case CloseSession():
                close = worker_pb2.Close(
                    reason=worker_pb2.CloseReason.Value(f"CLOSE_REASON_{effect.reason}"), message=effect.message
                )
            case _:
                assert_never(effect)
    if connection.ack_sequence:
        yield worker_pb2.ConnectResponse(ack=worker_pb2.Ack(sequence=connection.ack_sequence))
        connection.ack_sequence = 0
    if dropped:
        # Before what may need one of the same content, which then has the same id.
        yield worker_pb2.ConnectResponse(drop_artifacts=worker_pb2.DropArtifacts(artifact_ids=dropped))
    for assignments in work.messages():
        yield worker_pb2.ConnectResponse(assignments=assignments)
    if revoked:
        yield worker_pb2.ConnectResponse(revoke=worker_pb2.Revoke(lease_ids=revoked))
    if stopped:
        yield worker_pb2.ConnectResponse(stop=worker_pb2.Stop(lease_ids=stopped))
    if not effects and connection.is_beat_due:
        yield worker_pb2.ConnectResponse(heartbeat=worker_pb2.Heartbeat())
    connection.is_beat_due = False
    if close is not None:
        yield worker_pb2.ConnectResponse(close=close)


def _welcome(effect: WelcomeWorker, config: ServerConfig, server_id: str) -> worker_pb2.Welcome:
    return worker_pb2.Welcome(
        session_id=effect.session_id,
        resumed=effect.resumed,
        heartbeat_interval=convert.duration(config.heartbeat_interval_s),
        session_ttl=convert.duration(config.session_ttl_s),
        drop_lease_ids=effect.drop_lease_ids,
        inline_limit_bytes=config.inline_limit_bytes,
        log_limit_bytes=config.log_limit_bytes,
        silence_limit=convert.duration(config.silence_limit_s),
        server_id=server_id,
        drop_artifact_ids=effect.drop_artifact_ids,
        message_limit_bytes=config.message_limit_bytes,
    )


class _Work:
    """Assignments and the code they call, in messages of a size that workers take; code comes no later than its use."""

    def __init__(self, connection: Connection, config: ServerConfig) -> None:
        self._sent = connection.sent_digests
        self._limit_bytes = min(config.message_limit_bytes, WORKER_LIMIT_BYTES) - ENVELOPE_BYTES
        # What surrounds each of many is not counted.
        self._part_bytes = min(PART_BYTES, self._limit_bytes * 3 // 4)
        self._full: list[worker_pb2.Assignments] = []
        self._last = worker_pb2.Assignments()
        self._size = 0

    def messages(self) -> list[worker_pb2.Assignments]:
        """Return what was added, in order."""
        return [*self._full, self._last] if self._size else self._full

    def add(self, effect: Assign) -> str:
        """Add a lease; return for people why it cannot be sent, nothing when it can."""
        if effect.function.digest not in self._sent and (excess := self._add_code(*code_to_proto(effect.function))):
            return excess
        message = _add(self._last, effect)
        size = message.ByteSize()
        if self._size + size > self._part_bytes:
            del self._last.assignments[-1]
            if size > self._limit_bytes:
                why = f"what it is given takes {size} bytes, and a message to a worker may have {self._limit_bytes}"
                remedy = "give it fewer or smaller values, or larger ones, which are stored where they were made"
                return f"{why}; {remedy}"
            self._make_room(size)
            self._last.assignments.append(message)
        self._size += size
        return ""

    def _add_code(self, function: task_pb2.Function, bundle: task_pb2.CodeBundle | None) -> str:
        for part in (bundle, function):
            if part is None or part.digest in self._sent:
                continue
            size = part.ByteSize()
            if size > self._limit_bytes:
                return f"its code takes {size} bytes, and a message to a worker may have {self._limit_bytes}"
            self._make_room(size)
            self._size += size
            if isinstance(part, task_pb2.Function):
                self._last.functions.append(part)
            else:
                self._last.bundles.append(part)
            self._sent.add(part.digest)
        return ""

    def _make_room(self, size: int) -> None:
        if self._size and self._size + size > self._part_bytes:
            self._full.append(self._last)
            self._last, self._size = worker_pb2.Assignments(), 0


def _add(assignments: worker_pb2.Assignments, effect: Assign) -> worker_pb2.Assignment:
    message = assignments.assignments.add(
        lease_id=effect.lease_id,
        slot=effect.slot,
        tenant=effect.tenant,
        function_digest=effect.function.digest,
        outputs=effect.outputs,
        isolation=convert.ISOLATION_TO_PROTO[effect.isolation],
        resources=convert.resources_to_proto(effect.resources),
        gpu_indices=effect.gpu_indices,
        after_lease_id=effect.after_lease_id,
        batched=effect.is_batched,
        split_outputs=effect.split_outputs,
        sequence=effect.sequence,
    )
    if effect.timeout_s is not None:
        message.timeout.CopyFrom(convert.duration(effect.timeout_s))
    for member in effect.attempts:
        attempt = message.attempts.add(run_id=member.run_id, task_id=member.task_id, number=member.attempt)
        for name, binding in member.inputs.items():
            convert.fill_binding(attempt.inputs[name], binding)
    return message
