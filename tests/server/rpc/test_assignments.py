"""The order in which a worker is told what waits for it."""

from dataclasses import replace
from typing import Any

from lattice.v1 import task_pb2, worker_pb2
from lattice.v1.worker_pb2 import ConnectResponse

from lattice_server.config import ServerConfig
from lattice_server.core.messages import (
    CloseSession,
    DrainWorker,
    DropArtifact,
    RevokeLease,
    SendArtifact,
    StopLease,
    WelcomeWorker,
)
from lattice_server.core.model import Function, Payload
from lattice_server.engine.stores.code_store import SentCode
from lattice_server.engine.workers.outbox import Connection
from lattice_server.rpc.worker_messages import responses
from tests.server.core.scenes import Scene, node, ready

CONTENT_ID = "0" * 64


def told(scene: Scene, connection: Connection, *effects: Any, limit_bytes: int | None = None) -> list[ConnectResponse]:
    """Return the messages that carry effects."""
    config = ServerConfig() if limit_bytes is None else ServerConfig(worker_message_limit_bytes=limit_bytes)
    return responses(list(effects), connection, config, "id", lambda *_: None)


def test_effects_that_are_due_share_one_message() -> None:
    scene = Scene(node())
    scene.tell(ready("a"))
    connection = Connection("w", later=lambda *_: None)
    code = task_pb2.Function(digest=scene.leases["a"].function.digest, python={"pickle": b"code"})
    lease = replace(scene.leases["a"], function=Function(code.digest, False, code))
    connection.acknowledgement.add(7)
    session_id = lease.session_id
    (message,) = told(
        scene,
        connection,
        WelcomeWorker("w", session_id, True, ()),
        StopLease(session_id, "stopped"),
        RevokeLease(session_id, "revoked"),
        lease,
        DropArtifact(session_id, CONTENT_ID),
        SendArtifact(session_id, "transfer", "wanted", 5),
        DrainWorker(session_id, None),
        CloseSession(session_id, "DRAINED", "so it is"),
    )
    assert message.welcome.session_id == session_id
    assert message.acknowledged_sequence == 7
    assert list(message.drop_artifact_ids) == [CONTENT_ID]
    assert list(message.functions) == [code]
    assert [assigned.lease_id for assigned in message.assignments] == [lease.lease_id]
    assert list(message.revoke_lease_ids) == ["revoked"]
    assert list(message.stop_lease_ids) == ["stopped"]
    assert [(wanted.transfer_id, wanted.offset) for wanted in message.send_artifacts] == [("transfer", 5)]
    assert message.HasField("drain")
    assert message.close.reason == worker_pb2.CLOSE_REASON_DRAINED


def test_effects_are_split_over_messages_in_field_order_when_one_is_too_large() -> None:
    scene = Scene(node(cpu=9.0))
    large = Payload("application/json", '"' + "x" * 400_000 + '"')
    scene.tell(*(ready(name, given=large) for name in "abc"))
    leases, connection = [scene.leases[name] for name in "abc"], Connection("w", later=lambda *_: None)
    connection.sent.add(leases[0].function)
    connection.acknowledgement.add(7)
    stop = StopLease(leases[0].session_id, leases[0].lease_id)
    first, *between, last = told(scene, connection, stop, *leases, limit_bytes=1_000_000)
    assert (first.acknowledged_sequence, list(last.stop_lease_ids)) == (7, [leases[0].lease_id])
    messages = [first, *between, last]
    assert [a.lease_id for message in messages for a in message.assignments] == [lease.lease_id for lease in leases]
    assert len(messages) > 1
    assert all(message.ByteSize() < 1_000_000 for message in messages)
    assert [message.acknowledged_sequence for message in messages[1:]] == [0] * len(messages[1:])


def test_nothing_goes_out_when_nothing_is_due() -> None:
    connection = Connection("w")
    assert told(Scene(node()), connection) == []
    connection.is_beat_due = True
    assert told(Scene(node()), connection) == [ConnectResponse()], "a sign of life"


def test_a_worker_is_told_to_forget_code_and_sent_it_again_when_it_is_called_again() -> None:
    scene = Scene(node(cpu=9.0))
    scene.tell(*(ready(name) for name in "abc"))
    connection = Connection("w", later=lambda *_: None)
    connection.sent = SentCode(limit_bytes=150)
    codes = {name: task_pb2.Function(digest=name, python={"pickle": b"x" * 60}) for name in "abc"}
    leases = {
        name: replace(scene.leases[name], function=Function(name, False, code, size_bytes=60))
        for name, code in codes.items()
    }
    (message,) = told(scene, connection, leases["a"], leases["b"])
    assert (list(message.functions), list(message.forget_digests)) == ([codes["a"], codes["b"]], [])
    (message,) = told(scene, connection, leases["a"], leases["c"])
    assert (list(message.functions), list(message.forget_digests)) == ([codes["c"]], ["b"])
    (message,) = told(scene, connection, leases["b"])
    assert (list(message.functions), list(message.forget_digests)) == ([codes["b"]], ["a"])


def test_code_goes_out_again_when_a_worker_asks_for_it() -> None:
    scene = Scene(node())
    connection = Connection("w", later=lambda *_: None)
    code = task_pb2.Function(digest="a", python={"pickle": b"code"})
    function = Function("a", False, code)
    connection.sent.add(function)
    connection.send_code(function)
    (message,) = told(scene, connection)
    assert list(message.functions) == [code]
    assert told(scene, connection) == []
