"""The order in which a worker is told what waits for it."""

from lattice_server.config import ServerConfig
from lattice_server.core.messages import DropArtifact
from lattice_server.core.model import Artifact, Payload
from lattice_server.engine.sessions import Connection
from lattice_server.rpc.assignments import responses
from tests.server.core.scenes import Scene, node, ready

CONTENT_ID = "0" * 64


def test_a_value_is_dropped_before_an_assignment_that_needs_one_of_the_same_content() -> None:
    scene = Scene(node())
    scene.tell(ready("a", given=Payload("application/json", Artifact(CONTENT_ID, 1, "head"))))
    lease, connection = scene.leases["a"], Connection("w")
    connection.sent_digests.add(lease.function.digest)
    dropped = DropArtifact(lease.session_id, CONTENT_ID)
    told = responses([dropped, lease], connection, ServerConfig(), "id", lambda *_: None)
    assert [message.WhichOneof("message") for message in told] == ["drop_artifacts", "assignments"]
