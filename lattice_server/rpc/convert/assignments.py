"""Owns how effects become messages to a worker. Rule: everything that waits goes out coalesced; code travels once."""

from collections.abc import Callable
from typing import assert_never

from lattice.v1 import errors_pb2, task_pb2, worker_pb2

from lattice_server.config import ServerConfig
from lattice_server.core.messages import (
    AnswerQuestion,
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
from lattice_server.core.model import Failure, Function
from lattice_server.core.tenancy import id_of
from lattice_server.engine.outbox import Connection
from lattice_server.rpc.chunking import ENVELOPE_BYTES, PART_BYTES
from lattice_server.rpc.convert import payloads
from lattice_server.rpc.convert.tasks import code_to_proto

Later = StopLease | RevokeLease | SendArtifact | DrainWorker | CloseSession
WORKER_LIMIT_BYTES = 256 * 1024 * 1024  # What every worker takes.


def responses(
    effects: list[WelcomeWorker | ToSession],
    connection: Connection,
    config: ServerConfig,
    server_id: str,
    too_large: Callable[[Assign, str], None],
) -> list[worker_pb2.ConnectResponse]:
    """Return the messages that carry `effects` and the acknowledgement that is due: one, unless it would be too large.

    `too_large` is told each lease that no message can carry, and why.
    """
    sequence = connection.acknowledgement.take()
    is_beat_due, connection.is_beat_due = connection.is_beat_due, False
    wanted = connection.take_wanted()
    if not (effects or sequence or wanted or is_beat_due):
        return []
    work = _Work(connection, config)
    for function in wanted:
        work.add_code(function)
    # A worker acts on the fields by their numbers: those before the assignments are in the first message, and those
    # after them in the last.
    first = work.last
    first.acknowledged_sequence = sequence
    answers: list[AnswerQuestion] = []
    later: list[Later] = []
    for effect in effects:
        match effect:
            case Assign():
                if excess := work.add(effect):
                    too_large(effect, excess)
            case WelcomeWorker():
                first.welcome.CopyFrom(_welcome(effect, config, server_id))
            case DropArtifact():
                first.drop_artifact_ids.append(effect.artifact_id)
            case AnswerQuestion():
                answers.append(effect)
            case StopLease() | RevokeLease() | SendArtifact() | DrainWorker() | CloseSession():
                later.append(effect)
            case _:
                assert_never(effect)
    for answer in answers:
        work.add_answer(answer)
    work.last.forget_digests.extend(connection.sent.take_excess())
    for effect in later:
        _add_later(work.last, effect)
    return [*work.full, work.last]


def _add_later(message: worker_pb2.ConnectResponse, effect: Later) -> None:
    match effect:
        case StopLease():
            message.stop_lease_ids.append(effect.lease_id)
        case RevokeLease():
            message.revoke_lease_ids.append(effect.lease_id)
        case SendArtifact():
            message.send_artifacts.add(
                transfer_id=effect.transfer_id, artifact_id=effect.artifact_id, offset=effect.offset
            )
        case DrainWorker():
            message.drain.SetInParent()
            if effect.deadline_s is not None:
                message.drain.deadline.CopyFrom(payloads.duration(effect.deadline_s))
        case CloseSession():
            message.close.reason = worker_pb2.CloseReason.Value(f"CLOSE_REASON_{effect.reason}")
            message.close.message = effect.message
        case _:
            assert_never(effect)


def _welcome(effect: WelcomeWorker, config: ServerConfig, server_id: str) -> worker_pb2.Welcome:
    return worker_pb2.Welcome(
        session_id=effect.session_id,
        resumed=effect.resumed,
        heartbeat_interval=payloads.duration(config.heartbeat_interval_s),
        session_ttl=payloads.duration(config.session_ttl_s),
        drop_lease_ids=effect.drop_lease_ids,
        inline_limit_bytes=config.inline_limit_bytes,
        log_limit_bytes=config.log_limit_bytes,
        silence_limit=payloads.duration(config.silence_limit_s),
        server_id=server_id,
        drop_artifact_ids=effect.drop_artifact_ids,
        message_limit_bytes=config.worker_message_limit_bytes,
        question_limit_bytes=config.question_limit_bytes,
    )


class _Work:
    """Messages of a size that workers take, of which `last` is being filled; code comes no later than its use."""

    def __init__(self, connection: Connection, config: ServerConfig) -> None:
        self.full: list[worker_pb2.ConnectResponse] = []
        self.last = worker_pb2.ConnectResponse()
        self._sent = connection.sent
        self._limit_bytes = min(config.worker_message_limit_bytes, WORKER_LIMIT_BYTES) - ENVELOPE_BYTES
        # What surrounds each of many is not counted.
        self._part_bytes = min(PART_BYTES, self._limit_bytes * 3 // 4)
        self._size = 0

    def add(self, effect: Assign) -> str:
        """Add a lease; return for people why it cannot be sent, nothing when it can."""
        if excess := self.add_code(effect.function):
            return excess
        message = _add(self.last, effect)
        size = message.ByteSize()
        if self._size + size > self._part_bytes:
            del self.last.assignments[-1]
            if size > self._limit_bytes:
                why = f"what it is given takes {size} bytes, and a message to a worker may have {self._limit_bytes}"
                remedy = "give it fewer or smaller values, or larger ones, which are stored where they were made"
                return f"{why}; {remedy}"
            self._make_room(size)
            self.last.assignments.append(message)
        self._size += size
        return ""

    def add_answer(self, effect: AnswerQuestion) -> None:
        """Add the answer of a question."""
        message = worker_pb2.Answer(sequence=effect.sequence, lease_id=effect.lease_id, number=effect.number)
        match effect.answer:
            case str():
                message.unanswered = effect.answer
            case Failure():
                message.failure.CopyFrom(payloads.failure_to_proto(effect.answer) or errors_pb2.Failure())
            case payload:
                payloads.fill_payload(message.payload, payload)
        size = message.ByteSize()
        self._make_room(size)
        self._size += size
        self.last.answers.append(message)

    def add_code(self, function: Function) -> str:
        """Add a function unless the worker has it, and its bundle; return for people why it cannot be sent."""
        if self._sent.use(function.digest):
            return ""
        parts = [part for part in code_to_proto(function) if part is not None and part.digest not in self._sent]
        if (size := max(part.ByteSize() for part in parts)) > self._limit_bytes:
            return f"its code takes {size} bytes, and a message to a worker may have {self._limit_bytes}"
        for part in reversed(parts):  # a bundle comes no later than its function
            self._make_room(part.ByteSize())
            self._size += part.ByteSize()
            if isinstance(part, task_pb2.Function):
                self.last.functions.append(part)
            else:
                self.last.bundles.append(part)
        self._sent.add(function)
        return ""

    def _make_room(self, size: int) -> None:
        if self._size and self._size + size > self._part_bytes:
            self.full.append(self.last)
            self.last, self._size = worker_pb2.ConnectResponse(), 0


def _add(response: worker_pb2.ConnectResponse, effect: Assign) -> worker_pb2.Assignment:
    message = response.assignments.add(
        lease_id=effect.lease_id,
        slot=effect.slot,
        tenant=effect.tenant,
        function_digest=effect.function.digest,
        outputs=effect.outputs,
        isolation=payloads.ISOLATION_TO_PROTO[effect.isolation],
        resources=payloads.resources_to_proto(effect.resources),
        gpu_indices=effect.gpu_indices,
        after_lease_id=effect.after_lease_id,
        batched=effect.is_batched,
        split_outputs=effect.split_outputs,
        sequence=effect.sequence,
    )
    if effect.timeout_s is not None:
        message.timeout.CopyFrom(payloads.duration(effect.timeout_s))
    for member in effect.attempts:
        attempt = message.attempts.add(run_id=id_of(member.run_id), task_id=member.task_id, number=member.attempt)
        for name, binding in member.inputs.items():
            payloads.fill_binding(attempt.inputs[name], binding)
    return message
