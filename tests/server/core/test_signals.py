"""Signals: named values that callers send to a run, and the attempts that wait for them."""

from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lattice_server.core.errors import ConflictError, ExhaustedError, InvalidError, PreconditionError
from lattice_server.core.messages import (
    AttemptAwaits,
    AwaitedSignal,
    CallEnded,
    ExplainRequested,
    ReasonKind,
    RunFinished,
    SignalAwaited,
    SignalTaken,
    TaskAwaits,
    TaskExplained,
    TaskRetrying,
    TaskStarted,
    TaskSucceeded,
)
from lattice_server.core.model import Failure, FailureKind
from lattice_server.core.run import dag
from lattice_server.core.run.run import Run
from lattice_server.core.run.signals import Signals
from lattice_server.core.run.status import RunStatus
from tests.examples import examples
from tests.server.core.cluster import value
from tests.server.core.graphs import hello, task
from tests.server.core.run_scenes import BROKEN, OUT, RunScene
from tests.server.core.scenes import Scene, ready

requests = map(str, count())


def started(scene: RunScene, task_id: str, attempt: int = 1) -> None:
    scene.take(scene.run.handle(TaskStarted("r", task_id, attempt, "n", "ip", ()), 1.0))


def waits(
    scene: RunScene, task_id: str, number: int, name: str = "s", timeout: float | None = None, lease: str = "l"
) -> list[Any]:
    event = TaskAwaits("r", task_id, 1, f"{lease}-{task_id}", number, "", AwaitedSignal(name, timeout))
    return scene.take(scene.run.signals.wait(event, 1.0))


def sends(scene: RunScene, text: str = "1", name: str = "s") -> list[Any]:
    return scene.take(scene.run.signals.send(name, value(text), next(requests))[1])


def test_attempt_gets_the_values_of_a_signal_in_order_sent_before_or_after_its_wait() -> None:
    scene = RunScene(task("a"))
    started(scene, "a")
    (fact,) = sends(scene, "1")
    assert (fact.name, fact.index, fact.value) == ("s", 0, value("1"))
    assert waits(scene, "a", 1) == [SignalTaken("r", "a", 1, "s", 0), CallEnded("l-a", 1, value("1"))]
    assert waits(scene, "a", 2) == [SignalAwaited("r", "a", 1, "s")]
    assert waits(scene, "a", 3) == [SignalAwaited("r", "a", 1, "s")]
    assert scene.run.signals.awaited() == ["s"]
    assert sends(scene, "2")[1:] == [SignalTaken("r", "a", 1, "s", 1), CallEnded("l-a", 2, value("2"))]
    assert sends(scene, "3", "other")[1:] == []
    assert sends(scene, "4")[1:] == [SignalTaken("r", "a", 1, "s", 2), CallEnded("l-a", 3, value("4"))]
    assert scene.run.signals.awaited() == []


def test_each_task_and_each_attempt_gets_all_values_of_a_signal() -> None:
    scene = RunScene(task("a"), task("b"))
    for name in "ab":
        started(scene, name)
    sends(scene, "1")
    first = waits(scene, "a", 1)[1]
    assert replace(first, lease_id="l-b") == waits(scene, "b", 1)[1]
    scene.take(scene.run.handle(TaskRetrying("r", "a", 1, BROKEN, 0.0), 2.0))
    started(scene, "a", 2)
    assert waits(scene, "a", 1, lease="m")[1] == replace(first, lease_id="m-a")


def test_a_value_stays_read_when_a_later_attempt_reads_fewer() -> None:
    scene = RunScene(task("a"))
    started(scene, "a")
    for number in (1, 2):
        sends(scene, str(number))
        waits(scene, "a", number)
    scene.take(scene.run.handle(TaskRetrying("r", "a", 1, BROKEN, 0.0), 2.0))
    started(scene, "a", 2)
    assert waits(scene, "a", 1, lease="m")[1] == CallEnded("m-a", 1, value("1"))
    assert scene.run.signals.unread() == ()


def test_a_wait_ends_with_its_time_and_the_next_one_gets_the_value() -> None:
    scene = RunScene(task("a"))
    started(scene, "a")
    assert waits(scene, "a", 1, timeout=5.0) == [SignalAwaited("r", "a", 1, "s")]
    assert scene.run.signals.next_deadline() == 6.0
    assert scene.run.signals.tick(5.9) == []
    (ended,) = scene.take(scene.run.signals.tick(6.0))
    assert isinstance(ended, CallEnded)
    assert ended.result == Failure(FailureKind.TIMEOUT, "signal 's' was not sent in time")
    assert scene.run.signals.next_deadline() is None
    assert waits(scene, "a", 2, timeout=0.0)[-1].result == ended.result, "without a time, it only looks"
    sends(scene, "1")
    assert waits(scene, "a", 3, timeout=5.0)[1] == CallEnded("l-a", 3, value("1"))


def test_the_waits_of_an_attempt_end_with_it() -> None:
    scene = RunScene(task("a"))
    started(scene, "a")
    waits(scene, "a", 1, timeout=5.0)
    scene.fail("a")
    assert scene.run.signals.awaited() == []
    assert scene.run.signals.tick(9.0) == []


def test_a_run_ends_with_the_names_of_the_signals_that_no_task_took() -> None:
    scene = RunScene(task("a"))
    started(scene, "a")
    for name in ("taken", "partly", "partly", "unread"):
        sends(scene, name=name)
    waits(scene, "a", 1, "taken")
    waits(scene, "a", 2, "partly")
    effects = scene.take(scene.run.handle(TaskSucceeded("r", "a", 1, OUT), 2.0))
    (end,) = [effect for effect in effects if isinstance(effect, RunFinished)]
    assert end.unread_signals == ("partly", "unread")


def test_a_repeated_request_sends_a_signal_once() -> None:
    scene = RunScene(task("a"))
    sent, effects = scene.run.signals.send("s", value("1"), "once")
    assert effects == [sent]
    assert scene.run.signals.send("s", value("1"), "once") == (sent, [])
    for name, text in (("s", "2"), ("t", "1")):
        with pytest.raises(ConflictError, match="was used for another signal"):
            scene.run.signals.send(name, value(text), "once")
    scene.run.cancel("stop", 1.0)
    assert scene.run.signals.send("s", value("1"), "once") == (sent, [])


def test_signals_are_refused_with_a_reason() -> None:
    scene = RunScene(task("a"))
    started(scene, "a")
    for name in ("", "x" * 129):
        with pytest.raises(InvalidError, match="1 to 128 characters"):
            sends(scene, name=name)
        assert "1 to 128 characters" in waits(scene, "a", 1, name)[0].result
    few = Signals(RunStatus("r", is_open=False), max_signals=1)
    few.send("s", value("1"), "1")
    with pytest.raises(ExhaustedError) as full:
        few.send("t", value("1"), "2")
    assert full.value.reason == "TOO_MANY_SIGNALS"
    scene.run.cancel("stop", 1.0)
    with pytest.raises(PreconditionError) as over:
        sends(scene)
    assert over.value.reason == "RUN_ENDED"


def test_signals_are_restored_from_their_facts() -> None:
    scene = RunScene(task("a"))
    run, facts = scene.run, [*scene.effects]
    facts += run.handle(TaskStarted("r", "a", 1, "n", "ip", ()), 1.0)
    facts += run.signals.send("s", value("1"), "one")[1]
    facts += run.signals.send("t", value("2"), "two")[1]
    facts += waits(scene, "a", 1)
    again = Run("r", run.spec, dag.build(run.spec, ()))
    again.provide({})
    restoration = again.restoring()
    for fact in facts:
        if not isinstance(fact, CallEnded) and type(fact).__name__ != "TaskReady":
            restoration.apply(fact, 1.0)
    again.resume(restoration, 2.0)
    again.check()
    assert again.signals.unread() == ("t",)
    assert again.signals.send("s", value("1"), "one")[1] == []
    again.handle(TaskStarted("r", "a", 2, "n", "ip", ()), 3.0)
    event = TaskAwaits("r", "a", 2, "new", 1, "", AwaitedSignal("s"))
    assert again.signals.wait(event, 3.0)[1] == CallEnded("new", 1, value("1"))


@examples(300)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("send"), st.sampled_from("st")),
            st.tuples(st.just("wait"), st.sampled_from("ab"), st.sampled_from("st"), st.sampled_from([None, 1.0])),
            st.tuples(st.just("tick")),
        ),
        max_size=30,
    )
)
def test_every_value_reaches_each_task_once_and_in_order(steps: list[tuple[Any, ...]]) -> None:
    scene = RunScene(task("a"), task("b"))
    for name in "ab":
        started(scene, name)
    sent: dict[str, list[Any]] = {"s": [], "t": []}
    got: dict[tuple[str, str], list[Any]] = {}
    asked: dict[tuple[str, int], str] = {}
    now, numbers = 1.0, count(1)
    for kind, *step in steps:
        match kind:
            case "send":
                effects = sends(scene, str(len(sent[step[0]])), step[0])
                sent[step[0]].append(effects[0].value)
            case "wait":
                task_id, name, timeout = step
                asked["l-" + task_id, number := next(numbers)] = name
                event = TaskAwaits("r", task_id, 1, "l-" + task_id, number, "", AwaitedSignal(name, timeout))
                effects = scene.take(scene.run.signals.wait(event, now))
            case _:
                now += 0.7
                effects = scene.take(scene.run.signals.tick(now))
        for effect in effects:
            if isinstance(effect, CallEnded):
                name = asked.pop((effect.lease_id, effect.number))
                if not isinstance(effect.result, Failure):
                    got.setdefault((effect.lease_id, name), []).append(effect.result)
    for (_, name), values in got.items():
        assert values == sent[name][: len(values)]
    for (lease_id, _), name in asked.items():
        assert got.get((lease_id, name), []) == sent[name], "a sent value waits"
    unread = [
        name for name in "st" if max([len(v) for (_, n), v in got.items() if n == name], default=0) < len(sent[name])
    ]
    assert list(scene.run.signals.unread()) == unread


def test_an_attempt_that_waits_for_a_signal_holds_no_cpu_and_says_so() -> None:
    scene = Scene(hello("n", 1.0))
    assert scene.tell(ready("p")) == ["p"]
    lease = scene.leases["p"]
    awaits = AttemptAwaits(lease.session_id, lease.lease_id, 0, 1, "", AwaitedSignal("approval"))
    assert scene.tell(awaits, ready("q")) == ["q"]
    scene.tell(ExplainRequested(1, "r", "p"))
    (told,) = [effect for effect in scene.effects if isinstance(effect, TaskExplained)]
    assert told.explanation is not None
    (reason,) = told.explanation.reasons
    assert (reason.kind, reason.message) == (ReasonKind.SIGNAL, "attempt 1 on node 'n' waits for signal 'approval'")
    scene.succeed("q")
    scene.tell(CallEnded(lease.lease_id, 1, value("1")))
    (answer,) = [effect for effect in scene.effects if type(effect).__name__ == "AnswerQuestion"]
    assert (answer.lease_id, answer.number, answer.answer) == (lease.lease_id, 1, value("1"))
