"""The memory of live runs and of drafts: counted exactly for each tenant, and bounded."""

import asyncio
import contextlib
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lattice_server.core.errors import ExhaustedError, LatticeError
from lattice_server.core.messages import TaskCancelled, TaskLogged, TasksSpawned, TaskStarted, TaskSucceeded
from lattice_server.core.model import FailureKind, Payload
from lattice_server.core.run.run import Bounds
from lattice_server.core.states import RunState
from lattice_server.core.tenancy import Reach, key_of
from lattice_server.engine.bus import MessageBus
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.runs.admission import Admission
from lattice_server.engine.runs.ended_runs import Retention
from lattice_server.engine.runs.entry import RUN_BYTES, TASK_BYTES, RunEntry
from lattice_server.engine.stores.code_store import CodeStore
from lattice_server.engine.stores.usage import Bound
from lattice_server.engine.workers.sessions import Sessions
from lattice_server.engine.workflows.draft_graphs import SPEC_BYTES, DraftGraphs
from tests.server.core.graphs import task, workflow
from tests.server.engine.test_orchestrator import ONE_TASK, STOPPED, Holdings

SMALL = RUN_BYTES + 20 * TASK_BYTES
TENANTS = ("a", "b")


def build(bound: Bound) -> tuple[Orchestrator, Admission]:
    store: Any = Holdings()
    admission = Admission(Bounds(), 1000, bound)
    bus = MessageBus(asyncio.get_running_loop())
    return Orchestrator(bus, Sessions(2.0), store, CodeStore(), Retention(), admission), admission


def start(orchestrator: Orchestrator, run_id: str, tenant: str, tasks: int = 1) -> RunEntry:
    spec = workflow({f"t{number}": () for number in range(tasks)})
    return orchestrator.start_run(
        run_id, spec, parameters={}, fingerprint=run_id, labels={}, priority=0, tenant=tenant, reach=Reach(tenant)
    )[0]


def payload(size: int) -> Payload:
    return Payload("application/json", b"x" * size)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["start", "output", "log", "add", "spawn", "cancel"]),
        st.integers(0, 9),
        st.sampled_from(TENANTS),
        st.integers(1, 30_000),
    ),
    max_size=30,
)


async def apply(orchestrator: Orchestrator, what: str, number: int, tenant: str, size: int) -> None:
    """Do one step of a history to a run; a refusal is a step too."""
    key = key_of(f"r{number}", tenant)
    if what == "start":
        start(orchestrator, f"r{number}", tenant, 1 + size % 9)
        return
    entry = orchestrator.runs.get(key)
    if entry is None:
        return
    open_ids = [name for name, record in entry.run.tasks.items() if record.is_with_scheduler]
    if what == "cancel":
        orchestrator.cancel_run(f"r{number}", "", Reach(tenant))
        orchestrator.deliver([TaskCancelled(key, name, 0, STOPPED) for name in open_ids])
    elif what == "add":
        added = [task(f"added {size} {index}") for index in range(size % 9)]
        await orchestrator.add_tasks(f"r{number}", added, None, Reach(tenant))
    elif open_ids and what == "spawn":
        orchestrator.deliver([TasksSpawned(key, open_ids[0], (task(f"spawned {size}"),))])
    elif open_ids and what == "log":
        orchestrator.deliver([TaskLogged(key, open_ids[0], 1, False, "x" * size, False)])
    elif open_ids:
        started = TaskStarted(key, open_ids[0], 1, "n", "ip", ())
        orchestrator.deliver([started, TaskSucceeded(key, open_ids[0], 1, {"out": payload(size)})])


@given(STEPS)
@settings(max_examples=60, deadline=None)
def test_live_runs_are_counted_exactly_by_tenant(steps: list[tuple[str, int, str, int]]) -> None:
    async def scenario() -> None:
        orchestrator, admission = build(Bound(4 * SMALL, share=0.5))
        for step in steps:
            with contextlib.suppress(LatticeError):
                await apply(orchestrator, *step)
            live = [entry for entry in orchestrator.runs.values() if not entry.run.is_terminal]
            expected = Counter[str]()
            for entry in live:
                expected[entry.run.tenant] += entry.kept_bytes
            assert admission.memory.total == expected.total()
            assert {tenant: admission.memory.of(tenant) for tenant in TENANTS} == {t: expected[t] for t in TENANTS}
            assert admission.open_tasks == sum(entry.run.open_tasks for entry in live)

    asyncio.run(scenario())


def test_work_over_a_tenants_share_is_refused_and_other_tenants_go_on() -> None:
    async def scenario() -> None:
        orchestrator, _ = build(Bound(2 * SMALL, share=0.5))
        start(orchestrator, "r", "a", 15)
        more = [task(f"u{number}") for number in range(15)]
        with pytest.raises(ExhaustedError) as caught:
            start(orchestrator, "s", "a", 15)
        with pytest.raises(ExhaustedError) as caught_too:
            await orchestrator.add_tasks("r", more, None, Reach("a"))
        for error in (caught.value, caught_too.value):
            assert (error.reason, error.metadata["store"]) == ("STORE_FULL", "live runs")
            assert error.metadata["limit_bytes"] == str(SMALL)
            assert error.retry_after_s == 1.0
        assert start(orchestrator, "r", "b", 15).run.state is RunState.RUNNING

    asyncio.run(scenario())


def test_a_run_that_outgrows_the_share_of_its_tenant_fails_and_others_go_on() -> None:
    async def scenario() -> None:
        orchestrator, admission = build(Bound(2 * SMALL, share=0.5))
        entry, other = start(orchestrator, "r", "a", 2), start(orchestrator, "r", "b", 2)
        started = TaskStarted(entry.key, "t0", 1, "n", "ip", ())
        orchestrator.deliver([started, TaskSucceeded(entry.key, "t0", 1, {"out": payload(SMALL)})])
        assert entry.run.state is RunState.CANCELLING
        orchestrator.deliver([TaskCancelled(entry.key, "t1", 0, STOPPED)])
        assert entry.run.state is RunState.FAILED
        assert entry.run.failure is not None
        assert entry.run.failure.kind is FailureKind.RESOURCES
        assert "live runs" in entry.run.failure.message
        assert admission.memory.of("a") == 0
        assert other.run.state is RunState.RUNNING

    asyncio.run(scenario())


def test_an_attempt_that_spawns_over_the_share_of_its_tenant_fails() -> None:
    async def scenario() -> None:
        orchestrator, _ = build(Bound(2 * SMALL, share=0.5))
        entry = start(orchestrator, "r", "a")
        spawned = tuple(task(f"s{number}") for number in range(30))
        orchestrator.deliver([TaskStarted(entry.key, "t0", 1, "n", "ip", ()), TasksSpawned(entry.key, "t0", spawned)])
        refusal = entry.run.tasks["t0"].cancelled
        assert refusal is not None
        assert refusal.kind is FailureKind.RESOURCES
        assert len(entry.run.tasks) == 1

    asyncio.run(scenario())


DRAFT_STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "use"]), st.integers(0, 4), st.sampled_from(TENANTS), st.integers(0, 5000)),
    max_size=30,
)


@given(DRAFT_STEPS)
@settings(deadline=None)
def test_drafts_are_counted_exactly_by_tenant_and_stay_within_their_bound(steps: list[Any]) -> None:
    async def scenario() -> None:
        store: Any = Holdings()
        bound = Bound(10 * SPEC_BYTES, share=0.5)
        drafts = DraftGraphs(store, 100, bound)
        expected: dict[str, SimpleNamespace] = {}
        for what, number, tenant, size in steps:
            key = key_of(f"d{number}", tenant)
            if what == "use":
                drafts.use_up(key)
                if key in expected:
                    expected[key].size = 0
                continue
            try:
                drafts.expect(key, tenant, None, size, 1)
            except LatticeError:
                continue
            drafts.add(key, {}, list(ONE_TASK.tasks), size, None, Reach(tenant))
            expected.setdefault(key, SimpleNamespace(tenant=tenant, size=0)).size += size + SPEC_BYTES
            for name in TENANTS:
                assert drafts.usage.of(name) == sum(d.size for d in expected.values() if d.tenant == name)
                assert drafts.usage.of(name) <= bound.of_tenant

    asyncio.run(scenario())


def test_the_number_of_drafts_is_bounded_for_each_tenant() -> None:
    async def scenario() -> None:
        store: Any = Holdings()
        drafts = DraftGraphs(store, 100, Bound(10 * SPEC_BYTES, share=0.5), max_drafts=4)
        for number in range(2):
            drafts.add(f"d{number}", {}, [], 0, None, Reach("a"))
        with pytest.raises(ExhaustedError) as caught:
            drafts.expect("more", "a", None, 0, 0)
        assert caught.value.reason == "QUEUE_FULL"
        drafts.expect("more", "b", None, 0, 0)

    asyncio.run(scenario())
