"""Tasks that may connect to some servers: which nodes they get, and the explanation when no node restricts servers."""

from lattice_server.core.messages import (
    AttemptAccessedNetwork,
    NetworkAccess,
    NetworkVerdict,
    TaskAccessedNetwork,
)
from lattice_server.core.model import Isolation
from tests.server.core.scenes import Scene, node, ready

SANDBOXES = {"isolations": frozenset({Isolation.NONE, Isolation.SUBPROCESS, Isolation.SECCOMP})}
ONE = {"isolation": Isolation.SECCOMP, "network": ("a.b:443",)}


def test_task_with_servers_runs_on_a_node_that_restricts_them_at_its_level() -> None:
    scene = Scene(node("open", **SANDBOXES))
    assert scene.tell(ready("a", **ONE), ready("b", isolation=Isolation.SECCOMP)) == ["b"]
    assert [reason.message for reason in scene.why("a")] == [
        "node 'open': at isolation seccomp it cannot restrict which servers a task connects to"
    ]
    assert scene.tell(node("other", **SANDBOXES, network_isolations=frozenset({Isolation.SUBPROCESS}))) == []
    assert scene.tell(node("strict", **SANDBOXES, network_isolations=frozenset({Isolation.SECCOMP}))) == ["a"]
    assert scene.leases["a"].network == ("a.b:443",)
    assert scene.leases["b"].network == ()


def test_access_to_a_server_is_passed_on_to_the_run() -> None:
    scene = Scene(node("strict", **SANDBOXES, network_isolations=frozenset({Isolation.SECCOMP})))
    scene.tell(ready("a", **ONE))
    lease = scene.leases["a"]
    access = NetworkAccess("a.b", 443, NetworkVerdict.ALLOWED, "", "1.2.3.4", 1, 0, 0, False)
    scene.tell(AttemptAccessedNetwork(lease.session_id, lease.lease_id, 0, access))
    assert [effect.access for effect in scene.effects if isinstance(effect, TaskAccessedNetwork)] == [access]
