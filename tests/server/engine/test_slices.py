"""Work in slices: the size of a slice, and the other work between two slices. Steps are counted, time is not."""

import asyncio
import re
from collections.abc import Callable

import pytest

from lattice_server.core.messages import CancelRequested, TaskReady
from lattice_server.core.model import Function, OutputRef, TaskSpec, WorkflowSpec
from lattice_server.core.run import dag
from lattice_server.core.run.run import Effect, Run
from lattice_server.core.run.task_table import tabulating
from lattice_server.core.states import RunState
from lattice_server.core.steps import STEP_ITEMS, Steps, finish
from lattice_server.engine.slices import Slices

FUNCTION = Function("f", False, None)
COUNT = 20 * STEP_ITEMS


def flat(count: int) -> WorkflowSpec:
    """Return tasks side by side."""
    return WorkflowSpec(tuple(TaskSpec(f"t{number}", FUNCTION, outputs=("out",)) for number in range(count)))


def fan(count: int) -> WorkflowSpec:
    """Return a task and `count` behind it."""
    first = TaskSpec("first", FUNCTION, outputs=("out",))
    inputs = {"x": OutputRef("first", "out")}
    return WorkflowSpec((first, *(TaskSpec(f"t{number}", FUNCTION, inputs=inputs) for number in range(count))))


def chain(count: int) -> WorkflowSpec:
    """Return tasks one after the other."""
    inputs = [{"x": OutputRef(f"t{number - 1}", "out")} if number else {} for number in range(count)]
    tasks = (TaskSpec(f"t{number}", FUNCTION, inputs=inputs[number], outputs=("out",)) for number in range(count))
    return WorkflowSpec(tuple(tasks))


def yields(steps: Steps[object]) -> int:
    """Return how many steps there are."""
    count = 0
    for _ in steps:
        count += 1
    return count


@pytest.mark.parametrize("shape", [flat, fan, chain])
def test_a_graph_is_built_in_short_steps(shape: Callable[[int], WorkflowSpec]) -> None:
    spec = shape(COUNT)
    # Ids, edges and the graph itself are looked at one after the other.
    assert yields(dag.building(spec)) >= 3 * COUNT // STEP_ITEMS
    assert yields(tabulating("r", dag.build(spec))) >= COUNT // STEP_ITEMS


@pytest.mark.parametrize("shape", [flat, fan, chain])
def test_a_run_hands_over_a_few_tasks_at_once_and_in_the_end_all(shape: Callable[[int], WorkflowSpec]) -> None:
    spec = shape(400)
    whole, sliced = (Run("r", spec, dag.build(spec, ()), slice_tasks=size) for size in (None, 10))
    batches = [sliced.start({}, 0.0)]
    while sliced.is_unsettled:
        batches.append(sliced.proceed(0.0))
    assert max(map(ready_in, batches)) <= 10
    assert [effect for batch in batches for effect in batch] == whole.start({}, 0.0)


@pytest.mark.parametrize("shape", [flat, fan, chain])
def test_a_run_takes_added_tasks_in_slices_and_tells_them_as_if_added_at_once(
    shape: Callable[[int], WorkflowSpec],
) -> None:
    first = WorkflowSpec((TaskSpec("start", FUNCTION, outputs=("out",)),))
    added = shape(COUNT).tasks
    whole, sliced = (Run("r", first, dag.build(first, ()), slice_tasks=size) for size in (None, 10))
    for run in (whole, sliced):
        run.start({}, 0.0)
    steps = sliced.adding(added)
    assert yields(steps) >= 4 * COUNT // STEP_ITEMS
    assert list(sliced.tasks) == ["start"], "nothing changes while tasks are checked"
    batches = [sliced.add(finish(sliced.adding(added)), 1.0)]
    while sliced.is_unsettled:
        sliced.check()
        batches.append(sliced.proceed(1.0))
    sliced.check()
    assert max(map(ready_in, batches)) <= 10
    effects = [effect for batch in batches for effect in batch]
    expected = whole.append(added, 1.0)
    assert sorted(map(repr, effects)) == sorted(map(repr, expected))


@pytest.mark.parametrize("shape", [flat, fan, chain])
def test_a_run_stops_a_few_tasks_at_once(shape: Callable[[int], WorkflowSpec]) -> None:
    spec = shape(400)
    run = Run("r", spec, dag.build(spec, ()), slice_tasks=10)
    run.start({}, 0.0)
    batches = [run.cancel("enough", 1.0)]
    while run.is_unsettled:
        batches.append(run.proceed(1.0))
        run.check()
    stopped = [effect for batch in batches for effect in batch if isinstance(effect, CancelRequested)]
    assert max(len(effect.task_ids) for effect in stopped) <= 10
    assert not any(map(ready_in, batches))
    assert run.state is RunState.CANCELLING
    assert max(map(len, batches)) <= 12


def ready_in(effects: list[Effect]) -> int:
    """Return how many tasks are handed over."""
    return sum(isinstance(effect, TaskReady) for effect in effects)


def counting(name: str, steps: int, seen: list[str]) -> Steps[str]:
    """Return steps that note their turn."""
    for _ in range(steps):
        seen.append(name)
        yield
    return name


def test_one_slice_of_all_work_is_done_in_each_round_of_the_loop() -> None:
    async def scenario() -> None:
        slices, seen = Slices(), list[str]()

        async def others() -> None:
            while len(seen) < 30:
                seen.append("-")
                await asyncio.sleep(0)

        names = ["a", "b", "c"]
        work = [asyncio.create_task(slices.finish(counting(name, 4, seen))) for name in names]
        await asyncio.gather(others(), *work)
        assert [task.result() for task in work] == names
        assert "".join(seen).replace("-", "") == "abc" * 4, "they take turns"
        # The first slice of each is done before it waits for its turn.
        _, _, later = "".join(seen).partition("abc")
        assert later.count("-") >= 9
        assert re.search("[abc]{2}", later) is None, "two slices in one round"

    asyncio.run(scenario())


def test_work_goes_on_when_that_of_others_is_cancelled_or_fails() -> None:
    async def scenario() -> None:
        slices, seen = Slices(), list[str]()
        failures: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context["message"]))
        cancelled = asyncio.create_task(slices.finish(counting("a", 9, seen)))
        slices.call(lambda: 1 // 0)
        other = asyncio.create_task(slices.finish(counting("b", 9, seen)))
        await asyncio.sleep(0)
        cancelled.cancel()
        assert await other == "b"
        assert seen.count("b") == 9
        assert len(failures) == 1

    asyncio.run(scenario())


def test_steps_done_at_once_return_the_same_result() -> None:
    assert finish(counting("a", 5, [])) == "a"
