"""A run that retries another one: which tasks it takes over, and which it runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from lattice_server.core.messages import (
    RunFinished,
    TaskFailed,
    TaskReady,
    TasksAdded,
    TaskStarted,
    TaskSucceeded,
)
from lattice_server.core.model import Artifact, FailurePolicy, Payload, TaskSpec, WorkflowSpec
from lattice_server.core.run import dag
from lattice_server.core.run.reuse import Earlier, workflow_of
from lattice_server.core.run.run import Run
from lattice_server.core.states import RunState, TaskState
from tests.server.core.cluster import value
from tests.server.core.graphs import task
from tests.server.core.run_scenes import ANYWAY, BROKEN, mapped, optional, when

Works = Callable[[str], bool]
Items = Mapping[str, Sequence[str]]


def executed(
    run: Run, works: Works, items: Items | None = None, spawns: Mapping[str, TaskSpec] | None = None
) -> list[str]:
    """Run a run to its end as a scheduler would; return the tasks that were started, in order."""
    started: list[str] = []
    effects = run.start({}, 0.0)
    waiting: dict[str, str] = {}
    while True:
        run.check()
        for effect in effects:
            if isinstance(effect, TaskReady):
                waiting[effect.spec.task_id] = effect.after
        free = [t for t, after in waiting.items() if not after or run.tasks[after].state is TaskState.SUCCEEDED]
        free = [t for t in free if run.tasks[t].state in {TaskState.QUEUED, TaskState.BLOCKED}]
        if not free:
            assert run.is_terminal
            return started
        task_id = free[0]
        del waiting[task_id]
        started.append(task_id)
        effects = run.handle(TaskStarted("r", task_id, 1, "n", "ip", ()), 1.0)
        if spawns and task_id in spawns:
            effects = effects + run.spawn(task_id, [spawns[task_id]], 1.0)
        if works(task_id):
            split = {"out": [value(item) for item in (items or {})[task_id]]} if task_id in (items or {}) else {}
            done = TaskSucceeded("r", task_id, 1, {"out": value(f'"{task_id}"')}, split)
            effects = effects + run.handle(done, 2.0)
        else:
            effects = effects + run.handle(TaskFailed("r", task_id, 1, BROKEN), 2.0)


def first_run(*tasks: TaskSpec, policy: FailurePolicy = ANYWAY) -> Run:
    spec = WorkflowSpec(tasks, failure_policy=policy)
    return Run("r", spec, dag.build(spec, ()))


def retry_of(run: Run, is_kept: Callable[[Artifact], bool] = lambda artifact: True) -> Run:
    spec = workflow_of(run.spec, run.tasks)
    return Run("r2", spec, dag.build(spec, ()), earlier=Earlier("r", run.tasks, is_kept))


def only(*names: str) -> Works:
    return lambda task_id: task_id not in names


def everything(_: str) -> bool:
    return True


def test_finished_tasks_are_taken_over_and_the_others_run() -> None:
    run = first_run(task("a"), task("b", ["a"]), task("c", ["a"]), task("d", ["b", "c"]))
    assert executed(run, only("c")) == ["a", "b", "c"]
    again = retry_of(run)
    assert executed(again, everything) == ["c", "d"]
    assert again.state is RunState.SUCCEEDED
    assert again.retried_run_id == "r"
    assert [again.tasks[name].is_reused for name in "abcd"] == [True, True, False, False]
    assert again.tasks["a"].outputs == run.tasks["a"].outputs


def test_the_events_of_a_retry_are_those_of_a_run() -> None:
    run = first_run(task("a"), task("b", ["a"]))
    executed(run, only("b"))
    again = retry_of(run)
    effects = again.start({}, 0.0)
    succeeded = [effect for effect in effects if isinstance(effect, TaskSucceeded)]
    assert [(fact.task_id, fact.attempt, fact.outputs) for fact in succeeded] == [("a", 0, {"out": value('"a"')})]
    assert [effect.spec.task_id for effect in effects if isinstance(effect, TaskReady)] == ["b"]


def test_a_run_that_succeeded_is_reused_whole() -> None:
    run = first_run(task("a"), task("b", ["a"]))
    executed(run, everything)
    again = retry_of(run)
    assert isinstance(again.start({}, 0.0)[-1], RunFinished)
    assert again.state is RunState.SUCCEEDED


def test_items_of_a_map_are_taken_over_one_by_one() -> None:
    run = first_run(task("split"), mapped("m", "split"), task("all", ["m"]))
    items = {"split": [str(number) for number in range(300)]}
    failing = {f"m[{number}]" for number in (3, 77, 150, 299)}
    assert len(executed(run, only(*failing), items)) == 301
    assert run.counts[TaskState.SUCCEEDED] == 297
    again = retry_of(run)
    assert executed(again, everything) == ["m[3]", "m[77]", "m[150]", "m[299]", "all"]
    assert again.state is RunState.SUCCEEDED


def test_a_task_that_could_do_without_a_failed_one_runs_again() -> None:
    run = first_run(task("a"), task("b"), optional("c", "a", "b"))
    assert executed(run, only("b")) == ["a", "b", "c"]
    assert executed(retry_of(run), everything) == ["b", "c"]


def test_a_task_behind_one_that_was_skipped_on_purpose_is_reused() -> None:
    run = first_run(task("a"), when("skipped", "a", is_negated=True), optional("c", "skipped"), task("bad"))
    assert executed(run, only("bad")) == ["a", "bad", "c"]
    assert executed(retry_of(run), everything) == ["bad"]


def test_spawned_tasks_are_taken_over_with_the_task_that_spawned_them() -> None:
    spawns = {"plan": task("plan/x"), "plan/x": task("plan/x/y")}
    run = first_run(task("plan"), task("bad"))
    assert executed(run, only("bad"), spawns=spawns) == ["plan", "bad", "plan/x", "plan/x/y"]
    again = retry_of(run)
    assert executed(again, everything) == ["bad"]
    assert again.tasks["plan/x/y"].spawned_by == "plan/x"
    assert again.tasks["plan/x/y"].is_reused


def test_a_task_that_spawned_and_failed_runs_and_its_equal_spawn_does_not() -> None:
    run = first_run(task("plan"))
    assert executed(run, only("plan"), spawns={"plan": task("plan/x")}) == ["plan", "plan/x"]
    assert executed(retry_of(run), everything, spawns={"plan": task("plan/x")}) == ["plan"]
    other = replace(task("plan/x"), inputs={"changed": value("2")})
    assert executed(retry_of(run), everything, spawns={"plan": other}) == ["plan", "plan/x"]


def test_tasks_that_callers_added_are_in_the_retry() -> None:
    run = first_run(task("a"))
    run.start({}, 0.0)
    added = run.append([task("late", ["a"])], 0.5)
    assert isinstance(added[0], TasksAdded)
    run.handle(TaskStarted("r", "a", 1, "n", "ip", ()), 1.0)
    run.handle(TaskSucceeded("r", "a", 1, {"out": value("1")}), 2.0)
    run.handle(TaskFailed("r", "late", 1, BROKEN), 3.0)
    assert executed(retry_of(run), everything) == ["late"]


def test_a_task_whose_large_output_is_gone_runs_again() -> None:
    large = Payload("application/octet-stream", Artifact("gone", 10**6, "n"))
    run = first_run(task("a"), task("b", ["a"]), task("c", ["b"]))
    run.start({}, 0.0)
    for name, found in (("a", large), ("b", value("1"))):
        run.handle(TaskStarted("r", name, 1, "n", "ip", ()), 1.0)
        run.handle(TaskSucceeded("r", name, 1, {"out": found}), 2.0)
    run.handle(TaskFailed("r", "c", 1, BROKEN), 3.0)
    assert executed(retry_of(run), everything) == ["c"]
    assert executed(retry_of(run, lambda artifact: False), everything) == ["a", "b", "c"]


@given(st.data())
def test_retry_runs_the_tasks_that_had_not_succeeded_and_their_dependents(data: st.DataObject) -> None:
    names = [f"t{number}" for number in range(data.draw(st.integers(1, 8)))]
    tasks = []
    for number, name in enumerate(names):
        sources = data.draw(st.lists(st.sampled_from(names[:number]), unique=True)) if number else []
        tasks.append(optional(name, *sources) if data.draw(st.booleans()) else task(name, sources))
    failing = data.draw(st.sets(st.sampled_from(names)))
    policy = data.draw(st.sampled_from(FailurePolicy))
    run = first_run(*tasks, policy=policy)
    executed(run, only(*failing))
    again = retry_of(run)
    started = executed(again, everything)
    unfinished = {name for name in names if run.tasks[name].state is not TaskState.SUCCEEDED}
    wanted = unfinished.union(*(run.dag.descendants(name) for name in unfinished)) if unfinished else set()
    assert set(started) == wanted
    assert len(started) == len(wanted)
    assert again.state is RunState.SUCCEEDED
