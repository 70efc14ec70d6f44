"""Calls of tasks by tasks: parked leases give their CPUs back, get them back, and never wait in a circle."""

from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_server.core.messages import AttemptAwaits, AttemptSpawned, CallEnded, CallOutputs
from lattice_server.core.model import Capacity, FailureKind, Gpu, Resources
from lattice_server.core.states import RunState, TaskState
from tests.examples import examples
from tests.server.core.call_world import Program, World
from tests.server.core.graphs import hello, task
from tests.server.core.scenes import Scene, node, ready

GIB = 1 << 30


def machine(node_id: str = "n", cpu: float = 2.0, gpus: int = 0) -> Any:
    devices = tuple(Gpu(index, "gpu", 8 * GIB) for index in range(gpus))
    return replace(hello(node_id, cpu), capacity=Capacity(cpu, 8 * GIB, devices, slots=4))


def program(task_id: str, *calls: Program, resources: Resources | None = None, **more: Any) -> Program:
    settings = {} if resources is None else {"resources": resources}
    return Program(task(task_id, **settings), list(calls), **more)


def tree(name: str, depth: int, width: int, resources: Resources | None = None) -> Program:
    children = [tree(f"{name}/{n}", depth - 1, width, resources) for n in range(width)] if depth else []
    return program(name, *children, resources=resources)


@pytest.mark.parametrize("seed", range(20))
def test_four_parents_with_three_children_each_finish_on_two_cpus(seed: int) -> None:
    world = World(seed, [machine()], [tree(f"p{number}", 1, 3) for number in range(4)])
    world.play()
    assert world.run.state is RunState.SUCCEEDED
    assert len(world.run.tasks) == 16
    assert world.run.final_task_ids() == ["p0", "p1", "p2", "p3"]
    assert not world.machine.leases


@pytest.mark.parametrize("seed", range(5))
def test_a_chain_of_calls_deeper_than_the_slots_of_the_node_finishes(seed: int) -> None:
    world = World(seed, [machine(cpu=1.0)], [tree("p", 30, 1)])
    world.play()
    assert world.run.state is RunState.SUCCEEDED
    assert world.most_parked == 30


def test_called_tasks_go_before_new_parents_so_that_few_processes_wait() -> None:
    world = World(1, [machine()], [tree(f"p{number}", 1, 2) for number in range(100)])
    world.play()
    assert world.run.state is RunState.SUCCEEDED
    assert world.most_parked <= 10


numbers = count()


@st.composite
def programs(draw: st.DrawFn, depth: int = 3) -> Program:
    resources = Resources(
        cpu=draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
        memory_bytes=draw(st.sampled_from([0, 0, 3 * GIB])),
        gpu=draw(st.sampled_from([0.0, 0.0, 0.5, 1.0])),
    )
    children = draw(st.lists(programs(depth - 1), max_size=3)) if depth else []
    at_once, catches, fails = draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 9)) == 0
    spec = task(f"t{next(numbers)}", resources=resources)
    return Program(spec, children, at_once, catches, fails)


@examples(1000)
@given(
    st.lists(programs(), min_size=1, max_size=5),
    st.integers(0, 1000),
    st.sampled_from([[machine(gpus=1)], [machine(gpus=2)], [machine("a", gpus=1), machine("b", cpu=3.0, gpus=1)]]),
    st.sampled_from([None, None, 7, 30]),
)
def test_every_run_with_calls_ends_and_the_ledger_never_exceeds_the_capacity(
    roots: list[Program], seed: int, nodes: list[Any], stop_after: int | None
) -> None:
    world = World(seed, nodes, roots)
    world.play(stop_after)
    assert world.run.is_terminal, {name: record.state for name, record in world.run.tasks.items()}
    assert not world.machine.leases
    assert not world.machine.tasks
    for found in world.machine.nodes.values():
        capacity = found.spec.capacity
        assert (found.free_cpu, found.free_slots, found.parked, found.owes_cpu) == (capacity.cpu, 4, 0, False)
    if stop_after is None and not any(_fails(one) for one in roots):
        kinds = {failure.kind for failure in world.failures}
        assert kinds <= {FailureKind.NESTED_RESOURCES, FailureKind.USER_ERROR}


@examples(500)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 3), st.sampled_from([0.5, 1.0, 2.0]))
def test_calls_that_need_only_cpus_all_succeed(seed: int, roots: int, depth: int, cpu: float) -> None:
    made = [tree(f"p{number}", depth, 2, Resources(cpu=cpu)) for number in range(roots)]
    world = World(seed, [machine()], made)
    world.play()
    assert world.run.state is RunState.SUCCEEDED
    assert not world.failures


def _fails(one: Program) -> bool:
    return one.fails or any(map(_fails, one.calls))


def test_a_call_that_can_never_start_fails_and_names_the_holder_and_the_resource() -> None:
    gpu = Resources(cpu=1.0, gpu=1.0)
    inner = program("p/c", resources=gpu)
    world = World(0, [machine(gpus=1)], [program("p", inner, resources=gpu)])
    world.play()
    (failure,) = world.failures
    assert failure.kind is FailureKind.NESTED_RESOURCES
    assert "'p/c' can never start: gpu that it needs is held by 'p'" in failure.message
    assert world.run.tasks["p/c"].state is TaskState.FAILED
    assert world.run.state is RunState.FAILED


@pytest.mark.parametrize("seed", range(10))
def test_of_two_parents_that_wait_for_the_devices_of_each_other_one_goes_on(seed: int) -> None:
    gpu = Resources(cpu=0.0, gpu=1.0)
    made = [program(f"p{n}", program(f"p{n}/c", resources=gpu), resources=gpu, catches=True) for n in range(2)]
    world = World(seed, [machine(gpus=2)], made)
    world.play()
    assert world.run.state is RunState.SUCCEEDED
    assert len(world.failures) <= 1, "the other one finds room"


def test_the_failure_of_a_called_task_is_that_of_its_caller_to_handle() -> None:
    world = World(0, [machine()], [program("p", program("p/c", fails=True), catches=True)])
    world.play()
    assert world.run.state is RunState.SUCCEEDED
    assert world.run.tasks["p/c"].state is TaskState.FAILED


def test_called_tasks_are_cancelled_with_the_task_that_called_them() -> None:
    scene = Scene(machine())
    assert scene.tell(ready("p")) == ["p"]
    lease = scene.leases["p"]
    scene.tell(AttemptAwaits(lease.session_id, lease.lease_id, 0, 1, "p/c"))
    assert scene.machine.nodes["n"].free_cpu == 2.0
    scene.cancel("p")
    assert scene.fail("p") == []
    scene.machine.check()
    assert not scene.machine.leases


def test_answer_waits_for_the_cpu_of_its_parked_lease_and_precedes_new_tasks() -> None:
    scene = Scene(node(cpu=1.0))
    scene.tell(ready("p"), ready("later"))
    lease = scene.leases["p"]
    where = (lease.session_id, lease.lease_id, 0)
    spawned = AttemptSpawned(*where, (task("p/c"),), is_called=True)
    assert scene.tell(spawned, AttemptAwaits(*where, 1, "p/c")) == ["later"]
    ended = CallEnded(lease.lease_id, 1, CallOutputs({}))
    assert scene.tell(ended, ready("newer")) == []
    assert not [effect for effect in scene.effects if type(effect).__name__ == "AnswerQuestion"]
    assert scene.succeed("later") == []
    assert [type(effect).__name__ for effect in scene.effects].count("AnswerQuestion") == 1
    assert scene.succeed("p") == ["newer"]
