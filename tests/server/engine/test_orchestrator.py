"""The runs that the orchestrator keeps, the references that runs have, and the connections of sessions."""

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from lattice_server.core.errors import ExhaustedError, InvalidError, NotFoundError, PreconditionError
from lattice_server.core.messages import (
    CancelRequested,
    CloseSession,
    RunFinished,
    SchedulerEffect,
    TaskCancelled,
    TaskFailed,
    TaskLogged,
    TaskRetrying,
    TaskStarted,
    TaskSucceeded,
    WelcomeWorker,
    WorkerLost,
)
from lattice_server.core.model import Artifact, Failure, FailureKind, Payload, Resources, WorkflowSpec
from lattice_server.core.run.run import Bounds, Run
from lattice_server.core.scheduling.scheduler import Scheduler
from lattice_server.core.states import RunState
from lattice_server.core.steps import STEP_ITEMS
from lattice_server.core.tenancy import Reach
from lattice_server.engine.bus import MessageBus
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.runs.admission import Admission
from lattice_server.engine.runs.ended_ids import EndedIds
from lattice_server.engine.runs.ended_runs import Retention
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.stores.code_store import CodeStore
from lattice_server.engine.stores.uploads import Name, Uploads
from lattice_server.engine.stores.usage import Bound
from lattice_server.engine.workers.outbox import Connection
from lattice_server.engine.workers.sessions import Sessions
from lattice_server.engine.workflows.workflow_store import WorkflowStore
from lattice_server.rpc.convert.runs import run_to_proto, task_to_proto
from tests.server.core.graphs import VALUE, hello, task, workflow

SILENCE_LIMIT_S = 2.0
ONE_TASK = workflow({"t": ()})
STOPPED = Failure(FailureKind.CANCELLED, "stopped")


class Holdings:
    """A store without a directory: it counts references, and notes dropped artifacts."""

    def __init__(self) -> None:
        self.uploads = Uploads(Bound(0), 0.0, lambda artifact, tenant: None)
        self.holders: Counter[str] = Counter()
        self.dropped: list[str] = []

    def check(self, artifact_ids: Iterable[str], reach: Reach) -> None:
        """Accept every id."""

    def hold(self, artifacts: Iterable[Artifact], tenant: str = "") -> None:
        """Count a holder."""
        self.holders.update(artifact.artifact_id for artifact in artifacts)

    def take(self, artifacts: Iterable[Artifact], tenant: str = "", uploader: str | None = None) -> list[Name]:
        """Count a holder; none of them was uploaded here."""
        self.hold(artifacts)
        return []

    def release(self, artifacts: Iterable[Artifact], tenant: str = "") -> None:
        """Count one less; a release without a reference is an error."""
        for artifact in artifacts:
            assert self.holders[artifact.artifact_id] > 0
            self.holders[artifact.artifact_id] -= 1
            if not self.holders[artifact.artifact_id]:
                self.dropped.append(artifact.artifact_id)


def play(
    scenario: Callable[[Orchestrator, Holdings], Awaitable[None] | None],
    retained_runs: int = 2,
    retained_bytes: int = 1 << 30,
    retained_artifact_bytes: int = 1 << 30,
    max_open_tasks: int = 1000,
    result_ttl_s: float = 3600.0,
) -> None:
    """Play a scenario with an orchestrator that keeps that much of ended runs, and with the store it uses."""

    async def run() -> None:
        store: Any = Holdings()
        bus = MessageBus(asyncio.get_running_loop())
        retention = Retention(retained_runs, retained_bytes, retained_artifact_bytes, 1.0, result_ttl_s)
        admission = Admission(Bounds(), max_open_tasks)
        played = scenario(Orchestrator(bus, Sessions(SILENCE_LIMIT_S), store, CodeStore(), retention, admission), store)
        if played is not None:
            await played

    asyncio.run(run())


def stored(name: str, size_bytes: int = 9) -> Payload:
    return Payload("x/y", Artifact(name, size_bytes, "head"))


def start(orchestrator: Orchestrator, run_id: str, spec: WorkflowSpec = ONE_TASK, **parameters: Payload) -> RunEntry:
    spec = replace(spec, parameters={**dict.fromkeys(parameters, VALUE), **spec.parameters})
    settings: Any = {"parameters": parameters, "labels": {}, "priority": 0, "fingerprint": run_id}
    return orchestrator.start_run(run_id, spec, **settings)[0]


def finish(orchestrator: Orchestrator, run_id: str, output: Payload = VALUE, *, is_read: bool = True) -> None:
    entry = orchestrator.runs[run_id]
    facts = [TaskStarted(run_id, "t", 1, "n", "ip", ()), TaskSucceeded(run_id, "t", 1, {"out": output})]
    orchestrator.deliver(facts)
    if is_read:
        orchestrator.ended.note_read(entry)


def test_the_newest_ended_runs_are_kept_and_all_that_go_on() -> None:
    def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        start(orchestrator, "long")
        for number in range(5):
            start(orchestrator, f"r{number}")
        for number in (1, 0, 2, 3, 4):
            finish(orchestrator, f"r{number}")
        assert list(orchestrator.runs) == ["long", "r3", "r4"]
        with pytest.raises(NotFoundError) as caught:
            orchestrator.run("r0")
        assert caught.value.reason == "RUN_EVICTED"

    play(scenario)


def test_runs_of_many_tasks_evict_others_but_not_the_newest() -> None:
    def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        for name in "abc":
            start(orchestrator, name)
            finish(orchestrator, name)
        assert list(orchestrator.runs) == ["a", "b", "c"]
        start(orchestrator, "large", workflow({f"t{number}": () for number in range(9)}))
        orchestrator.cancel_run("large", "")
        orchestrator.deliver([TaskCancelled("large", f"t{n}", 0, STOPPED) for n in range(9)])
        assert list(orchestrator.runs) == ["large"]

    play(scenario, retained_runs=100, retained_bytes=30_000)


def test_no_more_tasks_are_open_than_may_be_and_a_place_that_is_free_is_given_again() -> None:
    def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        start(orchestrator, "a")
        start(orchestrator, "b")
        with pytest.raises(ExhaustedError) as caught:
            start(orchestrator, "c")
        assert (caught.value.reason, caught.value.retry_after_s) == ("QUEUE_FULL", 1.0)
        assert "c" not in orchestrator.runs
        finish(orchestrator, "a")
        assert start(orchestrator, "c").run.tasks

    play(scenario, max_open_tasks=2)


def test_a_tenant_is_let_in_while_another_one_fills_the_queue() -> None:
    def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        def ask(tenant: str, count: int) -> bool:
            spec, settings = workflow({f"t{number}": () for number in range(count)}), {"labels": {}, "priority": 0}
            try:
                orchestrator.start_run("", spec, parameters={}, fingerprint="", tenant=tenant, **settings)  # type: ignore[arg-type]
            except ExhaustedError:
                return False
            return True

        assert ask("greedy", 31)
        assert [ask("greedy", 2), ask("greedy", 1), ask("greedy", 1)] == [False, True, False]
        assert [ask("modest", 3), ask("modest", 2), ask("modest", 1)] == [False, True, False]
        granted = [ask(f"tenant-{number}", 2) for number in range(20)]
        assert granted == [True] * 15 + [False] * 5, "all of them at most twice the limit"

    play(scenario, max_open_tasks=32)


def test_a_run_of_any_size_is_admitted_when_no_task_is_open() -> None:
    def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        start(orchestrator, "large", workflow({f"t{number}": () for number in range(9)}))
        with pytest.raises(ExhaustedError):
            start(orchestrator, "a")

    play(scenario, max_open_tasks=2)


def test_a_task_is_refused_when_no_known_node_could_ever_run_it() -> None:
    def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        large = WorkflowSpec((task("t", resources=Resources(cpu=4.0)),))
        assert start(orchestrator, "before any node is known", large).run.tasks
        machine = Scheduler("e")
        orchestrator.deliver(machine.handle_all([hello("n", cpu=2)], 0.0))
        with pytest.raises(PreconditionError, match="node 'n': cpu: 4 wanted, 2 in all") as caught:
            start(orchestrator, "too large", large)
        assert caught.value.reason == "UNSATISFIABLE_RESOURCES"
        orchestrator.deliver(machine.handle_all([hello("m", cpu=4)], 0.0))
        orchestrator.deliver(machine.handle_all([WorkerLost("worker-of-m", "killed")], 1.0))
        assert start(orchestrator, "the node may come back", large).run.tasks

    play(scenario)


def test_a_run_fails_when_its_time_is_over() -> None:
    async def scenario() -> None:
        bus = MessageBus(asyncio.get_running_loop())
        store: Any = Holdings()
        orchestrator = Orchestrator(
            bus, Sessions(SILENCE_LIMIT_S), store, CodeStore(), Retention(), Admission(Bounds(), 10)
        )
        settings: Any = {"parameters": {}, "labels": {}, "priority": 0, "fingerprint": "", "timeout_s": 0.001}
        entry, _ = orchestrator.start_run("r", ONE_TASK, **settings)
        async for _ in entry.log.follow(0):
            if entry.run.failure is not None:
                break
        orchestrator.deliver([TaskCancelled("r", "t", 0, STOPPED)])
        assert (entry.run.state.value, entry.run.failure.kind.value) == ("failed", "timeout")

    asyncio.run(scenario())


def test_the_artifacts_of_a_run_go_with_it() -> None:
    def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        for name in "abc":
            start(orchestrator, name)
            finish(orchestrator, name, stored(f"artifact-of-{name}"))
        assert store.dropped == ["artifact-of-a"]

    play(scenario, result_ttl_s=0.0)


def test_the_inputs_of_a_run_are_kept_from_its_start() -> None:
    def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        start(orchestrator, "a", workflow({"t": ()}, parameters={"p": stored("default")}), p=stored("given"))
        start(orchestrator, "a", workflow({"t": ()}, parameters={"p": stored("default")}), p=stored("given"))
        assert store.holders == {"default": 1, "given": 1}, "the same run asked for twice is one run"
        finish(orchestrator, "a")
        assert store.dropped == []
        for name in "bc":
            start(orchestrator, name)
            finish(orchestrator, name)
        assert sorted(store.dropped) == ["default", "given"]

    play(scenario, result_ttl_s=0.0)


def test_an_artifact_is_dropped_when_the_last_of_two_runs_is_evicted() -> None:
    def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        for name in "ab":
            start(orchestrator, name, p=stored("shared"))
            finish(orchestrator, name)
        assert store.dropped == []
        start(orchestrator, "c")
        finish(orchestrator, "c")
        assert store.dropped == ["shared"]

    play(scenario, retained_runs=1, result_ttl_s=0.0)


def test_over_the_limit_the_oldest_artifacts_go_and_their_runs_stay() -> None:
    def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        start(orchestrator, "long", p=stored("of-long", 1000))
        for name in "abc":
            start(orchestrator, name)
            finish(orchestrator, name, stored(f"of-{name}", 10), is_read=False)
        assert store.dropped == ["of-a"]
        start(orchestrator, "large")
        finish(orchestrator, "large", stored("of-large", 100), is_read=False)
        assert store.dropped == ["of-a", "of-b", "of-c"], "the newest run's own stay, however large"
        assert list(orchestrator.runs) == ["long", "a", "b", "c", "large"]
        start(orchestrator, "d")
        finish(orchestrator, "d")
        assert store.dropped == ["of-a", "of-b", "of-c", "of-large"]
        assert store.holders["of-long"] == 1

    play(scenario, retained_runs=9, retained_artifact_bytes=20)


def test_a_stored_workflow_keeps_its_artifacts_until_it_changes() -> None:
    def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        def naming(*names: str) -> WorkflowSpec:
            return workflow({"t": ()}, parameters={name: stored(name) for name in names})

        library = WorkflowStore(store, CodeStore(), 9)  # type: ignore[arg-type]  # it counts as one
        entry, _ = library.create("w", naming("x", "y"), {}, None, "print")
        library.create("w", naming("x", "y"), {}, None, "print")
        assert store.holders == {"x": 1, "y": 1}
        library.change(entry, naming("y", "z"), {}, None)
        assert store.dropped == ["x"]
        with pytest.raises(InvalidError):
            library.change(entry, workflow({"t": ("ghost",)}, parameters={"v": stored("v")}), {}, None)
        assert +store.holders == {"y": 1, "z": 1}
        start(orchestrator, "a", entry.spec)
        library.delete("w")
        assert store.dropped == ["x"], "a run of it goes on"
        finish(orchestrator, "a")
        start(orchestrator, "b")
        finish(orchestrator, "b")
        assert sorted(store.dropped) == ["x", "y", "z"]

    play(scenario, retained_runs=0, result_ttl_s=0.0)


@pytest.mark.parametrize("told", ["graph", "parameter", "output", "item", "log", "lines", "retry"])
def test_runs_that_keep_many_bytes_are_forgotten_sooner_but_never_the_newest(told: str) -> None:
    large = Payload("application/json", "1" * 50_000)
    spec = WorkflowSpec((replace(task("t"), inputs={"x": large}),)) if told == "graph" else ONE_TASK
    given = {"p": large} if told == "parameter" else {}
    failure = Failure(FailureKind.USER_ERROR, "broken", exception=large)
    facts: dict[str, list[SchedulerEffect]] = {
        "log": [TaskLogged("large", "t", 1, False, "1" * 50_000, False)],
        "lines": [TaskLogged("large", "t", 1, False, "1", False)] * 200,
        "retry": [TaskRetrying("large", "t", 1, failure, 0.0)],
    }
    outputs = {"out": large if told == "output" else VALUE}
    end = TaskSucceeded("large", "t", 1, outputs, {"out": [large]} if told == "item" else {})

    def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        for name in "abc":
            start(orchestrator, name)
            finish(orchestrator, name)
        start(orchestrator, "large", spec, **given)
        orchestrator.deliver([*facts.get(told, []), TaskStarted("large", "t", 1, "n", "ip", ())])
        assert list(orchestrator.runs)[:3] == ["a", "b", "c"]
        orchestrator.deliver([end])
        assert list(orchestrator.runs) == ["large"]
        start(orchestrator, "d")
        finish(orchestrator, "d")
        assert list(orchestrator.runs) == ["d"]

    play(scenario, retained_runs=100, retained_bytes=45_000)


def test_a_workflow_is_refused_when_as_many_are_stored_as_may_be() -> None:
    library = WorkflowStore(Holdings(), CodeStore(), 2)  # type: ignore[arg-type]  # it counts as one
    for name in "ab":
        library.create(name, ONE_TASK, {}, None, "print")
    with pytest.raises(ExhaustedError) as caught:
        library.create("c", ONE_TASK, {}, None, "print")
    assert (caught.value.reason, caught.value.retry_after_s) == ("TOO_MANY_WORKFLOWS", None)
    assert library.create("a", ONE_TASK, {}, None, "print")[1] is False, "what is there may be asked for again"
    library.delete("b")
    assert library.create("c", ONE_TASK, {}, None, "print")[1]


def test_stored_workflows_take_no_more_bytes_than_they_may() -> None:
    library = WorkflowStore(Holdings(), CodeStore(), 9, Bound(100))  # type: ignore[arg-type]  # it counts as one
    entry, _ = library.create("a", ONE_TASK, {}, None, "print", 60)
    with pytest.raises(ExhaustedError, match="60 bytes of stored workflows are kept, and 41 more are over the 100"):
        library.create("b", ONE_TASK, {}, None, "print", 41)
    library.create("b", ONE_TASK, {}, None, "print", 40)
    with pytest.raises(ExhaustedError):
        library.change(entry, ONE_TASK, {}, None, 61)
    library.change(entry, ONE_TASK, {}, None, 50)
    library.delete("b")
    library.create("c", ONE_TASK, {}, None, "print", 50)


def test_a_run_that_is_no_longer_kept_is_not_run_again() -> None:
    def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        for name in "abc":
            start(orchestrator, name)
            finish(orchestrator, name)
        assert list(orchestrator.runs) == ["c"]
        text = "run 'a' has ended, and its results are no longer kept; it is not run again by that id"
        for ask in (lambda: start(orchestrator, "a"), lambda: orchestrator.run("a")):
            with pytest.raises(NotFoundError) as caught:
                ask()
            assert (caught.value.message, caught.value.reason) == (text, "RUN_EVICTED")
        with pytest.raises(NotFoundError, match="there is no run 'other'"):
            orchestrator.run("other")
        assert list(orchestrator.runs) == ["c"]

    play(scenario, retained_runs=1)


def test_ended_ids_are_remembered_for_an_hour_up_to_a_number() -> None:
    ended = EndedIds(max_ids=3)
    for number, name in enumerate("abcd"):
        ended.remember(name, f"print of {name}", 1000.0 * number)
    assert [ended.fingerprint_of(name, 3000.0) for name in "abd"] == [None, "print of b", "print of d"]
    assert ended.fingerprint_of("b", 1000.0 + 3600.0) == "print of b"
    assert ended.fingerprint_of("b", 1000.0 + 3600.1) is None
    ended.remember("e", "print", 7000.0)
    assert len(ended) == 1


def test_a_reader_of_a_run_that_is_forgotten_reads_on() -> None:
    def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        entry = start(orchestrator, "a")
        finish(orchestrator, "a")
        assert list(orchestrator.runs) == []
        assert entry.log.is_complete
        assert [event.sequence for event in entry.log.events] == [1, 2, 3, 4]

    play(scenario, retained_runs=0)


def test_a_fact_one_run_cannot_take_ends_that_run_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        bus, store = MessageBus(asyncio.get_running_loop()), Holdings()
        sessions, admission = Sessions(SILENCE_LIMIT_S), Admission(Bounds(), 10)
        orchestrator = Orchestrator(bus, sessions, store, CodeStore(), Retention(), admission)  # type: ignore[arg-type]  # counts
        start(orchestrator, "good")
        entry = start(orchestrator, "bad", workflow({"t": (), "u": ("t",)}))
        unknown = TaskFailed("bad", "ghost", 1, Failure(FailureKind.USER_ERROR, "broken"))
        orchestrator.deliver([unknown])
        finish(orchestrator, "good")
        assert orchestrator.run("good").run.state is RunState.SUCCEEDED
        assert entry.run.state is RunState.FAILED
        last = entry.log.events[-1].fact
        assert isinstance(last, RunFinished), "its readers wait no longer"
        assert last.failure is not None
        assert last.failure.kind is FailureKind.INTERNAL
        (named,) = re.findall("internal error (.*);", last.failure.message)
        record = next(record for record in caplog.records if record.getMessage() == "the run ends by a bug")
        assert vars(record).items() >= {"run_id": "bad", "error_id": named}.items()
        asked = [event for event in bus.take() or [] if isinstance(event, CancelRequested)]
        assert [(event.run_id, event.task_ids) for event in asked] == [("bad", ("t", "u"))]
        finish(orchestrator, "bad")
        orchestrator.deliver([unknown])
        assert entry.log.events[-1].fact is last, "what comes late is ignored"
        entry.run.check()

    asyncio.run(scenario())


def test_events_before_one_that_a_run_cannot_take_are_in_its_log() -> None:
    async def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        entry = start(orchestrator, "bad", workflow({"t": (), "u": ("t",)}))
        started = TaskStarted("bad", "t", 1, "n", "ip", ())
        unknown = TaskFailed("bad", "ghost", 1, Failure(FailureKind.USER_ERROR, "broken"))
        orchestrator.deliver([started, unknown, TaskSucceeded("bad", "t", 1, {})])
        facts = [event.fact for event in entry.log.events]
        assert facts[1] is started
        assert [type(fact) for fact in facts[2:]] == [TaskCancelled, TaskCancelled, RunFinished]

    play(scenario, retained_runs=1)


def test_a_run_that_cannot_start_or_be_cancelled_for_a_bug_ends_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        def fail(*_: Any) -> NoReturn:
            raise AssertionError("a broken invariant")

        start(orchestrator, "a")
        with monkeypatch.context() as patch:
            patch.setattr(Run, "start", fail)
            patch.setattr(Run, "cancel", fail)
            with pytest.raises(AssertionError):
                start(orchestrator, "b")
            with pytest.raises(AssertionError):
                orchestrator.cancel_run("a", "")
        assert [(entry.run.state, entry.log.is_complete) for entry in orchestrator.runs.values()] == [
            (RunState.FAILED, True),
            (RunState.FAILED, True),
        ]
        assert start(orchestrator, "c", workflow({"t": (), "u": ()})).run.tasks, "what ended counts as open no more"

    play(scenario, max_open_tasks=2)


def test_a_refused_addition_changes_nothing() -> None:
    async def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        entry = start(orchestrator, "a")
        with pytest.raises(InvalidError):
            await orchestrator.add_tasks("a", [task("t")], None)
        assert entry.run.state is RunState.RUNNING

    play(scenario)


def test_large_additions_to_one_run_at_once_are_all_made() -> None:
    async def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        entry = start(orchestrator, "a")
        large = [task(f"large{number}", after=["t"]) for number in range(1000)]
        other = [task(f"other{number}") for number in range(300)]
        await asyncio.gather(*(orchestrator.add_tasks("a", tasks, None) for tasks in (large, other, [task("small")])))
        assert len(entry.run.tasks) == 1302
        assert entry.run.revision == 4
        bus = orchestrator._bus
        while entry.run.is_unsettled:
            entry.run.check()
            bus.take()
            await asyncio.sleep(0)
        entry.run.check()

    play(scenario, max_open_tasks=10_000)


def test_the_scheduler_is_sent_more_of_a_large_run_once_it_has_taken_the_last_part() -> None:
    async def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        large = start(orchestrator, "large", WorkflowSpec(tuple(task(f"t{number}") for number in range(1000))))
        bus, taken = orchestrator._bus, list[int]()
        for _ in range(50):
            await asyncio.sleep(0)  # The scheduler is slow.
        assert large.run.is_unsettled
        start(orchestrator, "small")
        while large.run.is_unsettled:
            events = bus.take() or []
            taken.append(len(events))
            if len(taken) == 1:
                assert events[-1].run_id == "small", "it waits behind one part"  # type: ignore[union-attr]
            await asyncio.sleep(0)
        taken.append(len(bus.take() or []))
        assert sum(taken) == 1001
        assert max(taken) <= STEP_ITEMS + 1

    play(scenario, max_open_tasks=10_000)


def test_a_large_addition_is_refused_when_the_run_ends_meanwhile() -> None:
    async def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        entry = start(orchestrator, "a")
        adding = asyncio.create_task(orchestrator.add_tasks("a", [task(f"u{number}") for number in range(1000)], None))
        await asyncio.sleep(0)
        finish(orchestrator, "a")
        with pytest.raises(PreconditionError) as caught:
            await adding
        assert caught.value.reason == "RUN_ENDED"
        assert list(entry.run.tasks) == ["t"]

    play(scenario, max_open_tasks=10_000)


def connect(sessions: Sessions, resumed: bool) -> Connection:
    connection = Connection("w")
    sessions.greet(connection)
    if not resumed:
        sessions.perform(WelcomeWorker("w", "s", False, (), connection.greeting))
    return connection


def test_a_session_is_detached_when_its_connection_ends() -> None:
    async def scenario() -> None:
        sessions, detached = Sessions(SILENCE_LIMIT_S), list[str]()
        older = connect(sessions, resumed=False)
        sessions.on_detached = lambda session_id, _: detached.append(session_id)
        sessions.leave(older)
        assert detached == ["s"]

    asyncio.run(scenario())


def test_a_worker_that_hung_up_before_it_was_welcome_is_detached() -> None:
    async def scenario() -> None:
        sessions, detached = Sessions(SILENCE_LIMIT_S), list[str]()
        sessions.on_detached = lambda session_id, _: detached.append(session_id)
        connection = connect(sessions, resumed=True)
        sessions.leave(connection)
        assert detached == []
        sessions.perform(WelcomeWorker("w", "s", False, (), connection.greeting))
        assert detached == ["s"]

    asyncio.run(scenario())


def test_a_newer_connection_does_not_get_effects_of_an_older_session() -> None:
    async def scenario() -> None:
        sessions = Sessions(SILENCE_LIMIT_S)
        older, newer = connect(sessions, resumed=True), connect(sessions, resumed=True)
        sessions.perform(WelcomeWorker("w", "a", False, (), older.greeting))
        sessions.perform(CloseSession("a", "SUPERSEDED", "the worker connected again"))
        sessions.perform(WelcomeWorker("w", "b", False, (), newer.greeting))
        assert [effect.session_id for effect in await newer.next_effects()] == ["b"]

    asyncio.run(scenario())


def test_a_resumed_session_is_not_detached_by_the_connection_before() -> None:
    async def scenario() -> None:
        sessions, detached = Sessions(SILENCE_LIMIT_S), list[str]()
        older = connect(sessions, resumed=False)
        newer = connect(sessions, resumed=True)
        sessions.perform(WelcomeWorker("w", "s", True, (), newer.greeting))
        sessions.on_detached = lambda session_id, _: detached.append(session_id)
        sessions.leave(older)
        assert detached == []

    asyncio.run(scenario())


def test_a_session_being_resumed_is_not_detached_by_the_connection_before() -> None:
    async def scenario() -> None:
        sessions, detached = Sessions(SILENCE_LIMIT_S), list[str]()
        older = connect(sessions, resumed=False)
        connect(sessions, resumed=True)
        sessions.on_detached = lambda session_id, _: detached.append(session_id)
        sessions.leave(older)
        assert detached == [], "the scheduler has the newer hello already; this would detach the live session"

    asyncio.run(scenario())


def test_times_stay_true_when_the_computer_is_suspended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The monotonic clock stands still meanwhile, and wall time advances."""
    machines_s, people_s = 100.0, 1_000_000.0
    clocks = SimpleNamespace(monotonic=lambda: machines_s, time=lambda: people_s)
    for module in ("orchestrator", "commands.driver", "commands.starter"):
        monkeypatch.setattr(f"lattice_server.engine.{module}.time", clocks)

    def pass_time(seconds: float, suspended: float = 0.0) -> None:
        nonlocal machines_s, people_s
        machines_s += seconds
        people_s += seconds + suspended

    def scenario(orchestrator: Orchestrator, store: Holdings) -> None:
        entry = start(orchestrator, "r")
        pass_time(5.0)
        orchestrator.deliver([TaskStarted("r", "t", 1, "n", "ip", (), at=104.0)])
        pass_time(2.0, suspended=3600.0)
        orchestrator.deliver([TaskSucceeded("r", "t", 1, {"out": VALUE}, at=106.5)])
        pass_time(9.0, suspended=7200.0)
        found = task_to_proto(entry, "t")
        assert found.start_time.seconds == 1_000_004
        assert found.end_time.ToNanoseconds() == 1_003_606_500_000_000
        assert run_to_proto(entry).start_time.seconds == 1_000_004

    play(scenario)
