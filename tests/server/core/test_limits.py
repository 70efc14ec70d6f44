"""Limits of calls at once by concurrency key."""

from lattice_server.core.messages import LeaseReturned, ReasonKind, RevokeLease
from lattice_server.core.model import BatchPolicy, Resources
from tests.server.core.scenes import Scene, node, ready


def short(scene: Scene) -> None:
    """Let the scheduler know that the function is quick."""
    scene.tell(ready("warm"))
    scene.succeed("warm", took=0.001)


def test_no_more_calls_of_a_function_run_than_it_allows() -> None:
    scene = Scene(node(cpu=8))
    assert scene.tell(*[ready(name, max_parallel=2) for name in "abcd"]) == ["a", "b"]
    assert scene.succeed("a", at=1.0) == ["c"]


def test_a_key_is_counted_over_functions_runs_and_callers() -> None:
    scene = Scene(node(cpu=8))
    one = {"concurrency_key": "db", "max_parallel": 1}
    scene.tell(ready("a", **one))
    assert scene.tell(ready("b", run="s", **one), ready("c", tenant="x", function="sha256:g", **one)) == []
    assert scene.tell(ready("d")) == ["d"], "others pass"
    assert len(scene.succeed("a")) == 1


def test_the_server_may_limit_a_name_further() -> None:
    scene = Scene(node(cpu=8), limits={"db": 2})
    assert scene.tell(*[ready(n, concurrency_key="db", max_parallel=5) for n in "abc"]) == ["a", "b"]


def test_a_limit_of_zero_lets_nothing_run() -> None:
    scene = Scene(node(), limits={"db": 0})
    assert scene.tell(ready("a", concurrency_key="db")) == []
    assert [reason.kind for reason in scene.why("a")] == [ReasonKind.LIMIT]


def test_a_batch_is_one_call() -> None:
    scene = Scene(node(cpu=8))
    batched = {"batch": BatchPolicy(2), "max_parallel": 2}
    assert scene.tell(*[ready(name, **batched) for name in "abcdef"]) == ["a+b", "c+d"]


def test_the_strictest_of_those_that_run_holds() -> None:
    scene = Scene(node(cpu=8))
    scene.tell(ready("alone", concurrency_key="db", max_parallel=1))
    assert scene.tell(ready("a", concurrency_key="db", max_parallel=5)) == []
    assert scene.succeed("alone") == ["a"]


def test_task_with_a_lower_limit_is_not_starved_by_tasks_with_higher_limits() -> None:
    scene = Scene(node(cpu=8))
    shared = {"concurrency_key": "db", "max_parallel": 3}
    scene.tell(*[ready(name, **shared) for name in "abc"])
    scene.tell(ready("alone", concurrency_key="db", max_parallel=1), *[ready(name, **shared) for name in "def"])
    assert scene.succeed("a") == []
    assert scene.succeed("b") == []
    assert scene.succeed("c") == ["alone"]
    assert scene.succeed("alone") == ["d", "e", "f"]


def test_task_that_no_node_can_run_does_not_block_its_key() -> None:
    scene = Scene(node(cpu=8))
    scene.tell(ready("a", concurrency_key="db", max_parallel=3))
    huge = ready("huge", concurrency_key="db", max_parallel=1, resources=Resources(99.0))
    assert scene.tell(huge, ready("b", concurrency_key="db", max_parallel=3)) == ["b"]


def test_lease_sent_ahead_takes_no_permit_of_its_own() -> None:
    scene = Scene(node(cpu=8))
    scene.tell(ready("warm", max_parallel=1))
    scene.succeed("warm", at=0.001, took=0.001)
    assert scene.tell(*[ready(name, max_parallel=1) for name in "abc"]) == ["a", "b", "c"]
    assert len({scene.leases[name].slot for name in "abc"}) == 1
    assert len(scene.machine.nodes["n"].slots) == 1


def test_a_place_is_free_again_however_a_call_ends() -> None:
    scene = Scene(node(cpu=8))
    scene.tell(*[ready(name, max_parallel=1) for name in "abcd"])
    assert scene.fail("a") == ["b"]
    lease = scene.leases["b"]
    scene.cancel("b")
    assert scene.tell(LeaseReturned(lease.session_id, lease.lease_id, "")) == ["c"]


def test_no_lease_is_sent_behind_one_of_unknown_duration() -> None:
    scene = Scene(node(cpu=1))
    short(scene)
    scene.tell(ready("unknown", function="sha256:new"))
    assert scene.tell(ready("quick")) == []


def test_short_work_is_not_sent_behind_a_call_that_turned_out_long() -> None:
    scene = Scene(node(cpu=1))
    short(scene)
    scene.tell(ready("long"), at=1.0)
    assert scene.tell(ready("quick"), at=2.0) == []
    assert not any(isinstance(effect, RevokeLease) for effect in scene.effects)
