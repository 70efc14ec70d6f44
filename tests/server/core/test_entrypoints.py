"""Workers with functions of their own: which tasks they get, and the explanation when no worker has a function."""

import pytest

from lattice_server.core.messages import NodesDescribed, NodesRequested, WorkerLost
from lattice_server.core.runtime import ANY_RUNTIME, Runtime
from lattice_server.core.scheduling.placement import Shape, shape_of
from lattice_server.core.scheduling.shortages import impossibility
from tests.server.core.scenes import Scene, node, ready

OWN = frozenset({"js/count", "js/sleep"})


def shape(entrypoint: str) -> Shape:
    return shape_of(ready("a", entrypoint=entrypoint).spec)


def test_a_worker_that_names_entry_points_runs_those_only() -> None:
    scene = Scene(node("js", entrypoints=OWN))
    assert (
        scene.tell(ready("sent"), ready("named", entrypoint="statistics:mean"), ready("other", entrypoint="js/x")) == []
    )
    assert scene.tell(ready("own", entrypoint="js/count")) == ["own"]
    assert [reason.message for reason in scene.why("sent")] == ["node 'js': it runs its own entry points only"]
    assert [reason.message for reason in scene.why("named")] == ["node 'js': it has no entry point 'statistics:mean'"]
    assert scene.tell(node("py")) == ["sent", "named"]
    assert scene.tell(ready("more", entrypoint="js/sleep")) == ["more"]
    assert scene.leases["more"].session_id == scene.leases["own"].session_id


@pytest.mark.parametrize("name", ["statistics:mean", "a.b.c:d.e", "_x1:y", "größe:maß"])
def test_python_worker_runs_entry_points_that_python_can_import(name: str) -> None:
    assert Scene(node()).tell(ready("a", entrypoint=name)) == ["a"]


@pytest.mark.parametrize("name", ["js/count", "mean", "a:b:c", "a.:b", ".a:b", "1a:b", "a:", ":b", "a b:c", "a:b\n"])
def test_a_python_worker_does_not_run_other_names(name: str) -> None:
    scene = Scene(node())
    assert scene.tell(ready("a", entrypoint=name)) == []
    assert [reason.message for reason in scene.why("a")] == [f"node 'n': it has no entry point {name!r}"]


def test_a_name_of_pythons_form_may_be_another_workers_too() -> None:
    scene = Scene(node("js", cpu=1, entrypoints=frozenset({"package:call"})), node("py", cpu=1))
    assert scene.tell(*[ready(name, entrypoint="package:call") for name in "ab"]) == ["a", "b"]
    assert scene.leases["a"].session_id != scene.leases["b"].session_id


@pytest.mark.parametrize(
    "runtime", [Runtime("python"), Runtime("python", "3.11"), Runtime("python", "3.11.7"), ANY_RUNTIME]
)
def test_code_of_one_version_of_python_runs_there(runtime: Runtime) -> None:
    new, js = Runtime("python", "3.12.1"), Runtime("node", "18.1")
    scene = Scene(node("new", runtime=new), node("js", runtime=js, entrypoints=OWN))
    if runtime.version:
        assert scene.tell(ready("a", runtime=runtime)) == []
    assert scene.tell(node("old", runtime=Runtime("python", "3.11.7")), ready("b", runtime=runtime))[-1] == "b"


@pytest.mark.parametrize(
    "runtime",
    [Runtime("python", version) for version in ("3.1", "3.11.70", "3.12", "3.11.")] + [Runtime("node", "3.11")],
)
def test_code_of_another_version_does_not(runtime: Runtime) -> None:
    scene = Scene(node(runtime=Runtime("python", "3.11.7")))
    assert scene.tell(ready("a", runtime=runtime)) == []
    reason = f"node 'n': it runs python 3.11.7, and the function is for {runtime}"
    assert [found.message for found in scene.why("a")] == [reason]


def test_task_is_impossible_when_no_node_has_its_entry_point() -> None:
    scene = Scene(node("py"), node("js", entrypoints=OWN))
    nodes = [one.spec for one in scene.machine.nodes.values()]
    text = "node 'py': it has no entry point 'js/x'; node 'js': it has no entry point 'js/x'"
    assert impossibility(shape("js/x"), nodes) == text
    assert impossibility(shape("js/count"), nodes) == impossibility(shape(""), nodes) == ""


def test_entry_points_of_a_lost_worker_are_still_known() -> None:
    scene = Scene(node("py"), node("js", entrypoints=OWN))
    scene.tell(WorkerLost("worker-of-js", "killed"))
    changed = [effect for effect in scene.effects if type(effect).__name__ == "NodesChanged"]
    assert impossibility(shape("js/count"), changed[-1].nodes) == ""


def test_nodes_are_described_with_their_entry_points() -> None:
    scene = Scene(node("py"), node("js", entrypoints=OWN))
    scene.tell(NodesRequested(1))
    (answer,) = [effect for effect in scene.effects if isinstance(effect, NodesDescribed)]
    assert {shown.node_id: shown.entrypoints for shown in answer.nodes} == {"py": frozenset(), "js": OWN}
