"""Tasks that need services: they wait while one is not ready, and run on nodes that reach all of them."""

from typing import Any

from lattice_server.core.messages import ReasonKind, ServiceChanged, ServiceNeeded
from lattice_server.core.model import Failure, FailureKind, RetryPolicy
from tests.server.core.scenes import Scene, node, ready

FAILED = Failure(FailureKind.SERVICE_FAILED, "service 'm' cannot start: no memory")


def needing(task_id: str, *services: str, **settings: Any) -> Any:
    return ready(task_id, services=services or ("m",), **settings)


def up(key: str = "m", *nodes: str) -> ServiceChanged:
    return ServiceChanged(key, is_ready=True, nodes=frozenset(nodes) if nodes else None)


def needed(scene: Scene) -> dict[str, tuple[int, int]]:
    """Return the needs of services that the last step reported."""
    return {e.key: (e.waiting, e.others) for e in scene.effects if isinstance(e, ServiceNeeded)}


def test_task_waits_for_its_service_and_is_counted() -> None:
    scene = Scene(node("a"))
    assert scene.tell(needing("t"), needing("u")) == []
    assert needed(scene) == {"m": (2, 0)}
    scene.now = 7.0
    (reason,) = scene.why("t")
    assert (reason.kind, reason.message) == (ReasonKind.SERVICE, "service 'm' is not ready: there is no such service")
    assert scene.tell(ServiceChanged("m", detail="it is starting")) == []
    assert scene.why("t")[0].message == "service 'm' is not ready: it is starting"
    explanation = scene.explanation("t")
    assert explanation is not None
    assert explanation.waited_s == 7.0
    assert scene.tell(up()) == ["t", "u"]
    assert needed(scene) == {"m": (0, 2)}
    scene.succeed("t")
    assert needed(scene) == {"m": (0, 1)}
    scene.succeed("u")
    assert needed(scene) == {"m": (0, 0)}


def test_task_runs_on_a_node_that_reaches_an_instance() -> None:
    scene = Scene(node("a", cpu=4), node("b", cpu=1))
    scene.tell(up("m", "b"))
    assert scene.tell(needing("t"), needing("u")) == ["t"]
    assert scene.leases["t"].session_id == scene.machine.nodes["b"].session_id
    assert any("reaches no instance" in reason.message for reason in scene.why("u"))
    # An instance on the other node makes room for the queued task.
    assert scene.tell(up("m", "a", "b")) == ["u"]
    assert scene.leases["u"].session_id == scene.machine.nodes["a"].session_id


def test_task_of_several_services_needs_one_node_for_all() -> None:
    scene = Scene(node("a"), node("b"))
    scene.tell(up("m", "a"), up("n", "b"))
    assert scene.tell(needing("t", "m", "n")) == []
    assert scene.why("t")[0].message == "no node reaches an instance of each of m, n"
    assert scene.tell(up("n", "a", "b")) == ["t"]


def test_queued_task_waits_again_when_its_service_is_lost_during_another() -> None:
    scene = Scene(node("a", cpu=1))
    scene.tell(up())
    assert scene.tell(needing("t"), needing("u")) == ["t"]
    scene.tell(ServiceChanged("m", detail="it is starting"))
    assert needed(scene) == {"m": (1, 1)}
    assert scene.succeed("t") == []
    assert scene.ends() == {"t": "succeeded"}
    assert scene.tell(up()) == ["u"]


def test_retry_waits_for_the_service_too() -> None:
    scene = Scene(node("a"))
    scene.tell(up())
    scene.tell(needing("t", retry=RetryPolicy(max_attempts=2, initial_backoff_s=1.0)))
    scene.fail("t")
    scene.tell(ServiceChanged("m", detail="it is starting"))
    assert scene.tick_when_due() == []
    assert scene.why("t")[0].kind is ReasonKind.SERVICE
    assert scene.tell(up()) == ["t"]


def test_tasks_of_a_service_that_cannot_start_fail_now_and_later() -> None:
    scene = Scene(node("a"))
    scene.tell(needing("t"))
    scene.tell(ServiceChanged("m", failure=FAILED))
    assert scene.ends() == {"t": "failed"}
    scene.tell(needing("u"))
    assert scene.ends() == {"u": "failed"}
    scene.tell(ServiceChanged("m", detail="it is starting"))
    scene.tell(needing("v"))
    assert scene.ends() == {}


def test_waiting_task_can_be_cancelled_and_times_out() -> None:
    scene = Scene(node("a"))
    scene.tell(needing("t"), needing("u", total_timeout_s=5.0))
    scene.cancel("t")
    assert scene.ends() == {"t": "cancelled"}
    scene.tick_when_due()
    assert (scene.now, scene.ends()) == (5.0, {"u": "failed"})
    assert needed(scene) == {"m": (0, 0)}


def test_service_of_another_tenant_of_the_same_name_is_another_service() -> None:
    scene = Scene(node("a"))
    scene.tell(needing("t", tenant="x"), up("m"))
    assert scene.leases == {}
    assert scene.tell(up("m\nx")) == ["t"]
