"""Packs the effects for a worker into messages. Rule: effects that are due share messages, and code is sent once."""

from collections.abc import Callable
from typing import assert_never

from lattice.v1 import task_pb2, worker_pb2

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
from lattice_server.core.model import Function
from lattice_server.engine.workers.outbox import Connection
from lattice_server.rpc.chunking import ENVELOPE_BYTES, PART_BYTES
from lattice_server.rpc.convert.functions import code_to_proto
from lattice_server.rpc.convert.workers import Later, add_assignment, add_later, answer_to_proto, welcome_to_proto

WORKER_LIMIT_BYTES = 256 * 1024 * 1024  # Every worker accepts messages of this size.


def responses(
    effects: list[WelcomeWorker | ToSession],
    connection: Connection,
    config: ServerConfig,
    server_id: str,
    too_large: Callable[[Assign, str], None],
) -> list[worker_pb2.ConnectResponse]:
    """Return the messages that carry `effects` and the acknowledgement that is due: one, unless it would be too large.

    `too_large` is called with each lease that no message can carry, and the reason.
    """
    sequence = connection.acknowledgement.take()
    is_beat_due, connection.is_beat_due = connection.is_beat_due, False
    wanted = connection.take_wanted()
    if not (effects or sequence or wanted or is_beat_due):
        return []
    packer = _Packer(connection, config)
    for function in wanted:
        packer.add_code(function)
    # A worker acts on the fields by their numbers: those before the assignments are in the first message, and those
    # after them in the last.
    first = packer.last
    first.acknowledged_sequence = sequence
    answers: list[AnswerQuestion] = []
    later: list[Later] = []
    for effect in effects:
        match effect:
            case Assign():
                if excess := packer.add(effect):
                    too_large(effect, excess)
            case WelcomeWorker():
                first.welcome.CopyFrom(welcome_to_proto(effect, config, server_id))
            case DropArtifact():
                first.drop_artifact_ids.append(effect.artifact_id)
            case AnswerQuestion():
                answers.append(effect)
            case StopLease() | RevokeLease() | SendArtifact() | DrainWorker() | CloseSession():
                later.append(effect)
            case _:
                assert_never(effect)
    for answer in answers:
        packer.add_answer(answer_to_proto(answer))
    packer.last.forget_digests.extend(connection.sent.take_excess())
    for effect in later:
        add_later(packer.last, effect)
    return [*packer.full, packer.last]


class _Packer:
    """Messages of a size that workers accept. `full` ones are complete and `last` is being filled."""

    def __init__(self, connection: Connection, config: ServerConfig) -> None:
        self.full: list[worker_pb2.ConnectResponse] = []
        self.last = worker_pb2.ConnectResponse()
        self._sent = connection.sent
        self._limit_bytes = min(config.worker_message_limit_bytes, WORKER_LIMIT_BYTES) - ENVELOPE_BYTES
        # The field tags around each item are not counted.
        self._part_bytes = min(PART_BYTES, self._limit_bytes * 3 // 4)
        self._size = 0

    def add(self, effect: Assign) -> str:
        """Add a lease; return why it cannot be sent, empty when it can."""
        if excess := self.add_code(effect.function):
            return excess
        message = add_assignment(self.last, effect)
        size = message.ByteSize()
        if self._size + size > self._part_bytes:
            del self.last.assignments[-1]
            if size > self._limit_bytes:
                why = f"its inputs take {size} bytes, and a message to a worker may have {self._limit_bytes}"
                return f"{why}; pass fewer or smaller values inline, or larger ones, which become artifacts"
            self._make_room(size)
            self.last.assignments.append(message)
        self._size += size
        return ""

    def add_answer(self, message: worker_pb2.Answer) -> None:
        """Add the answer to a question."""
        size = message.ByteSize()
        self._make_room(size)
        self._size += size
        self.last.answers.append(message)

    def add_code(self, function: Function) -> str:
        """Add a function unless the worker has it, and its bundle; return why it cannot be sent, empty when it can."""
        if self._sent.use(function.digest):
            return ""
        parts = [part for part in code_to_proto(function) if part is not None and part.digest not in self._sent]
        if (size := max(part.ByteSize() for part in parts)) > self._limit_bytes:
            return f"its code takes {size} bytes, and a message to a worker may have {self._limit_bytes}"
        for part in reversed(parts):  # A bundle is sent no later than its function.
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
