"""Owns how effects become messages to a worker. Rule: everything that waits goes out coalesced; code travels once."""

from collections.abc import Callable, Iterator
from typing import assert_never

from lattice.v1 import worker_pb2

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
    assigned: list[Assign] = []
    stopped: list[str] = []
    revoked: list[str] = []
    dropped: list[str] = []
    close: worker_pb2.Close | None = None
    for effect in effects:
        match effect:
            case Assign():
                assigned.append(effect)
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
    for assignments in _assignments(assigned, connection, config.message_limit_bytes - ENVELOPE_BYTES, too_large):
        yield worker_pb2.ConnectResponse(assignments=assignments)
    if revoked:
        yield worker_pb2.ConnectResponse(revoke=worker_pb2.Revoke(lease_ids=revoked))
    if stopped:
        yield worker_pb2.ConnectResponse(stop=worker_pb2.Stop(lease_ids=stopped))
    if dropped:
        yield worker_pb2.ConnectResponse(drop_artifacts=worker_pb2.DropArtifacts(artifact_ids=dropped))
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
    )


def _assignments(
    assigned: list[Assign], connection: Connection, limit_bytes: int, too_large: Callable[[Assign, str], None]
) -> Iterator[worker_pb2.Assignments]:
    part, size = worker_pb2.Assignments(), 0
    for effect in assigned:
        size += _add_code(part, effect, connection)
        own = _add(part, effect)
        if size and size + own > min(PART_BYTES, limit_bytes):
            # It goes with the next, behind its code.
            last = part.assignments.pop()
            yield part
            part, size = worker_pb2.Assignments(assignments=[last]), 0
        if own > limit_bytes:
            part.assignments.pop()
            why = f"what it is given takes {own} bytes, and a message to a worker may have {limit_bytes}"
            too_large(effect, why)
        else:
            size += own
    if size:
        yield part


def _add_code(assignments: worker_pb2.Assignments, effect: Assign, connection: Connection) -> int:
    """Add the code of a lease that its stream has not carried; return its size in bytes."""
    sent, size = connection.sent_digests, 0
    function, bundle = code_to_proto(effect.function)
    if effect.function.digest not in sent:
        sent.add(effect.function.digest)
        assignments.functions.append(function)
        size += function.ByteSize()
    if bundle is not None and bundle.digest not in sent:
        sent.add(bundle.digest)
        assignments.bundles.append(bundle)
        size += bundle.ByteSize()
    return size


def _add(assignments: worker_pb2.Assignments, effect: Assign) -> int:
    """Add a lease; return its size in bytes."""
    message = assignments.assignments.add(
        lease_id=effect.lease_id,
        slot=effect.slot,
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
    return message.ByteSize()
