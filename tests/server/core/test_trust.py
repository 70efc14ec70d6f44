"""Values of sandboxes in a run: marked by the level of their task, and not given to weaker tasks as pickles."""

from dataclasses import replace
from typing import Any

import pytest

from lattice_server.core.messages import TaskFailed, TaskReady, TaskStarted, TaskSucceeded
from lattice_server.core.model import (
    BindingList,
    BindingMap,
    FailureKind,
    Function,
    Isolation,
    OutputRef,
    Parameter,
    Payload,
    Runtime,
    TaskSpec,
    WorkflowSpec,
)
from lattice_server.core.run import dag
from lattice_server.core.run.run import Run
from lattice_server.core.trust import is_weaker, stamped_all
from tests.server.core.graphs import SYNC, VALUE

PICKLES = [f"application/vnd.lattice.{name}" for name in ("cloudpickle", "pickle5", "pickle-with-outputs", "new")]
DATA = ["application/json", "application/octet-stream", "application/vnd.lattice.npy"]
PICKLE = Payload(PICKLES[0], b"pickle")
NODE = Function("node", is_async=False, definition=None, entrypoint="f", runtime=Runtime("node"))


def run_of(*tasks: TaskSpec, **parameters: Payload) -> tuple[Run, list[Any]]:
    spec = WorkflowSpec(tasks, parameters=parameters)
    run = Run("r", spec, dag.build(spec, ()))
    effects = run.start({}, 0.0)
    run.check()
    return run, effects


def succeed(run: Run, task_id: str, payload: Payload, **split: Any) -> list[Any]:
    run.handle(TaskStarted("r", task_id, 1, "n", "ip", ()), 1.0)
    effects = run.handle(TaskSucceeded("r", task_id, 1, {"out": payload}, split), 2.0)
    run.check()
    return effects


def maker(level: Isolation) -> TaskSpec:
    return TaskSpec("maker", SYNC, outputs=("out",), isolation=level)


def reader(level: Isolation, value: Any = None, **settings: Any) -> TaskSpec:
    value = value or OutputRef("maker", "out")
    return TaskSpec("reader", settings.pop("function", SYNC), inputs={"x": value}, isolation=level, **settings)


def refusals(effects: list[Any]) -> list[Any]:
    return [effect.failure for effect in effects if isinstance(effect, TaskFailed)]


@pytest.mark.parametrize("made_at", list(Isolation))
@pytest.mark.parametrize("read_at", list(Isolation))
@pytest.mark.parametrize("media_type", [*PICKLES, *DATA])
def test_task_is_refused_exactly_the_pickles_of_stricter_tasks(
    made_at: Isolation, read_at: Isolation, media_type: str
) -> None:
    run, effects = run_of(maker(made_at), reader(read_at))
    promised = [effect for effect in effects if isinstance(effect, TaskReady) and effect.after]
    effects = succeed(run, "maker", Payload(media_type, b"1", made_at))
    is_refused = is_weaker(read_at, made_at) and media_type in PICKLES
    assert [failure.kind for failure in refusals(effects)] == [FailureKind.UNTRUSTED_INPUT] * is_refused
    assert bool(promised) is not is_weaker(read_at, made_at)
    assert is_refused or any(isinstance(effect, TaskReady) for effect in [*promised, *effects])
    if is_refused:
        assert run.tasks["reader"].attempt == 0
        for word in ("'x'", "'maker'", media_type, repr(made_at.value), repr(read_at.value)):
            assert word in refusals(effects)[0].message


@pytest.mark.parametrize(
    "value",
    [
        BindingList((VALUE, OutputRef("maker", "out"))),
        BindingMap({"a": BindingList((OutputRef("maker", "out", path=("k",)),))}),
    ],
)
def test_task_is_refused_a_pickle_anywhere_in_an_input(value: Any) -> None:
    run, _ = run_of(maker(Isolation.SECCOMP), reader(Isolation.NONE, value))
    assert refusals(succeed(run, "maker", replace(PICKLE, produced_at=Isolation.SECCOMP)))


def test_task_is_refused_a_pickle_that_a_caller_passes_on() -> None:
    marked = replace(PICKLE, produced_at=Isolation.SECCOMP)
    for value, parameters in ((marked, {}), (Parameter("p"), {"p": marked})):
        _, effects = run_of(reader(Isolation.SUBPROCESS, value), **parameters)
        assert [failure.kind for failure in refusals(effects)] == [FailureKind.UNTRUSTED_INPUT]
        _, effects = run_of(reader(Isolation.SECCOMP, value), **parameters)
        assert not refusals(effects)


def test_task_with_an_earlier_untrusted_input_is_not_sent_early() -> None:
    between = TaskSpec("between", SYNC, outputs=("out",))
    spec = TaskSpec("reader", SYNC, inputs={"x": OutputRef("maker", "out"), "y": OutputRef("between", "out")})
    run, _ = run_of(maker(Isolation.SECCOMP), between, spec)
    effects = succeed(run, "maker", replace(PICKLE, produced_at=Isolation.SECCOMP))
    assert not [effect for effect in effects if isinstance(effect, TaskReady)]
    assert refusals(succeed(run, "between", VALUE))


def test_mapped_task_is_refused_items_that_are_pickles() -> None:
    run, _ = run_of(maker(Isolation.SECCOMP), reader(Isolation.NONE, over="x"))
    item = replace(PICKLE, produced_at=Isolation.SECCOMP)
    effects = succeed(run, "maker", replace(VALUE, produced_at=Isolation.SECCOMP), out=[VALUE, item])
    assert "'maker'" in refusals(effects)[0].message
    assert run.tasks["reader"].items is None


def test_function_of_another_language_is_given_every_value() -> None:
    run, _ = run_of(maker(Isolation.SECCOMP), reader(Isolation.NONE, function=NODE))
    effects = succeed(run, "maker", replace(PICKLE, produced_at=Isolation.SECCOMP))
    assert not refusals(effects)
    assert [effect.spec.task_id for effect in effects if isinstance(effect, TaskReady)] == ["reader"]


def test_values_are_marked_by_the_level_of_their_task_when_its_worker_says_less() -> None:
    stricter = replace(PICKLE, produced_at=Isolation.DOCKER)
    outputs, split = stamped_all({"a": PICKLE, "b": stricter}, {"a": [VALUE]}, Isolation.SECCOMP)
    marks = [outputs["a"].produced_at, outputs["b"].produced_at, split["a"][0].produced_at]
    assert marks == [Isolation.SECCOMP, Isolation.DOCKER, Isolation.SECCOMP]
    assert stamped_all({"a": PICKLE}, {}, Isolation.NONE) == ({"a": PICKLE}, {})


@pytest.mark.parametrize("level", list(Isolation))
def test_spawned_task_is_isolated_at_least_as_its_parent(level: Isolation) -> None:
    run, _ = run_of(maker(Isolation.SECCOMP))
    run.handle(TaskStarted("r", "maker", 1, "n", "ip", ()), 1.0)
    run.spawn("maker", [TaskSpec("maker/child", SYNC, isolation=level)], 1.0)
    child = run.tasks["maker/child"].spec
    assert child.isolation is (Isolation.DOCKER if level is Isolation.DOCKER else Isolation.SECCOMP)


@pytest.mark.parametrize("level", Isolation)
def test_spawned_task_may_connect_to_servers_of_a_sandboxed_parent_only(level: Isolation) -> None:
    run, _ = run_of(TaskSpec("maker", SYNC, outputs=("out",), isolation=level, network=("a.b:443", "*.c:443")))
    run.handle(TaskStarted("r", "maker", 1, "n", "ip", ()), 1.0)
    wider = ("a.b:443", "a.b:80", "x.c:443", "evil.com:443")
    run.spawn("maker", [TaskSpec("maker/child", SYNC, isolation=Isolation.SECCOMP, network=wider)], 1.0)
    assert run.tasks["maker/child"].spec.network == (wider if level is Isolation.NONE else ("a.b:443",))
