"""Bounded stores under random histories: their counts are exact, and eviction follows the rules of tenants."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lattice_server.core.errors import ExhaustedError
from lattice_server.core.model import Artifact, Bundle, Function
from lattice_server.core.tenancy import SEPARATOR, Reach, Shelf, key_of
from lattice_server.engine.runs.ended_runs import FETCH_S, EndedRuns, Retention
from lattice_server.engine.stores.code_store import CodeStore
from lattice_server.engine.stores.usage import Bound, Evictable, Usage
from tests.server.engine.test_orchestrator import Holdings

TENANTS = st.sampled_from(["a", "b", "c"])
BOUND = Bound(100, share=0.5)


def check_usage(usage: Usage, expected: dict[tuple[str, str], int]) -> None:
    """Assert that a usage counts just these things."""
    assert usage.total == sum(expected.values())
    for tenant in "abc":
        assert usage.of(tenant) == sum(size for (owner, _), size in expected.items() if owner == tenant)


@given(st.lists(st.tuples(TENANTS, st.integers(0, 5), st.booleans())))
def test_usage_counts_each_thing_once_while_it_has_holders(steps: list[tuple[str, int, bool]]) -> None:
    usage, holders = Usage("things", BOUND), Counter[tuple[str, str]]()
    for tenant, number, is_hold in steps:
        name = (tenant, str(number))
        if is_hold:
            usage.hold(*name, number)
            holders[name] += 1
        elif holders[name]:
            usage.release(*name)
            holders[name] -= 1
        assert all(usage.holds(*name) == bool(count) for name, count in holders.items())
        check_usage(usage, {name: int(name[1]) for name in +holders})


def test_a_tenant_loses_nothing_to_a_larger_one_when_nothing_else_may_go() -> None:
    usage = Usage("things", BOUND)
    evictable = Evictable(usage)
    for tenant, size in (("a", 45), ("b", 10), ("c", 46)):
        usage.hold(tenant, "x", size)
    evictable.add("b", "x")
    assert evictable.victim("c") is None
    assert evictable.victim("b") == ("b", "x")
    evictable.add("c", "x", sooner=False)
    assert evictable.victim("c") == evictable.victim("a") == ("c", "x")
    assert evictable.victim("c", spared="x") is None


@given(st.lists(st.tuples(TENANTS, st.integers(1, 60), st.booleans()), max_size=60))
def test_no_tenant_loses_anything_to_one_that_has_more(steps: list[tuple[str, int, bool]]) -> None:
    usage = Usage("things", BOUND)
    evictable = Evictable(usage)
    for number, (tenant, size, sooner) in enumerate(steps):
        usage.hold(tenant, str(number), size)
        evictable.add(tenant, str(number), sooner=sooner)
        while (victim := evictable.victim(tenant)) is not None:
            loser = victim[0]
            assert usage.of(loser) >= usage.of(tenant)
            assert loser == tenant or not usage.is_over(tenant)
            evictable.discard(*victim)
            usage.release(*victim)
        assert usage.total <= BOUND.total
        assert not any(map(usage.is_over, "abc"))


CODE = [
    Function(f"f{n}", False, None, Bundle(f"b{n % 2}", None, 7) if n % 3 else None, size_bytes=9 * n) for n in range(8)
]
CODE_STEPS = st.lists(
    st.tuples(st.sampled_from(["put", "get", "hold", "release"]), TENANTS, st.lists(st.sampled_from(CODE), max_size=3)),
    max_size=60,
)


@given(CODE_STEPS)
@settings(max_examples=200)
def test_the_code_store_keeps_referenced_code_and_its_bound(
    steps: list[tuple[str, str, list[Function]]],
) -> None:
    store = CodeStore(BOUND)
    held: Counter[tuple[str, str]] = Counter()
    holds: list[tuple[str, list[Function]]] = []
    for what, tenant, functions in steps:
        before = {name: kept.code for name, kept in store._kept.items()}
        try:
            if what == "put":
                for function in functions:
                    store.put(function, tenant)
            elif what == "hold":
                store.hold(tenant, functions)
                holds.append((tenant, functions))
                held.update(named(tenant, functions))
            elif what == "release" and holds:
                holder, held_by_it = holds.pop(0)
                store.release(holder, held_by_it)
                held.subtract(named(holder, held_by_it))
            elif what == "get":
                for (owner, digest), code in before.items():
                    assert store.get(digest, Reach(owner)) is code
        except ExhaustedError:
            pass  # there is too much, and referenced code stays
        check_usage(store.usage, {name: kept.code.size_bytes for name, kept in store._kept.items()})
        assert store.usage.total <= BOUND.total
        assert not any(map(store.usage.is_over, "abc"))
        assert all(name in store._kept for name, count in held.items() if count), "what is held was evicted"


def named(tenant: str, functions: list[Function]) -> list[tuple[str, str]]:
    return [
        (tenant, digest)
        for f in functions
        for digest in ([f.digest] if f.bundle is None else [f.digest, f.bundle.digest])
    ]


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def ended_run(number: int, tenant: str, size: int, artifacts: list[int], code: list[Function]) -> Any:
    """Return a run with the facts that retention reads."""
    return SimpleNamespace(
        key=key_of(f"r{number}", tenant),
        run=SimpleNamespace(tenant=tenant),
        kept_bytes=size,
        artifacts=[Artifact(f"x{n}", 3 * n, "head") for n in artifacts],
        functions={f.digest: f for f in code},
        fingerprint="",
    )


def test_runs_whose_results_were_read_are_evicted_first_then_the_oldest() -> None:
    clock, store = Clock(), Holdings()
    runs: Shelf[Any] = Shelf()
    ended = EndedRuns(runs, store, Retention(9, 100, 100, 1.0, 100.0), clock)  # type: ignore[arg-type]
    for number in range(4):
        runs[f"r{number}"] = entry = ended_run(number, "", 30, [], [])
        if number == 3:
            ended.note_read(runs["r1"])
        ended.add(entry)
    assert list(runs) == ["r0", "r2", "r3"], "r1 was read"
    runs["r4"] = ended_run(4, "", 30, [], [])
    ended.add(runs["r4"])
    assert list(runs) == ["r2", "r3", "r4"]
    clock.now = 101.0
    ended.note_read(runs["r2"])
    runs["r5"] = ended_run(5, "", 90, [], [])
    ended.add(runs["r5"])
    assert list(runs) == ["r5"]


RUN_STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("end"),
            TENANTS,
            st.integers(1, 70),
            st.lists(st.integers(0, 9), max_size=3),
            st.lists(st.sampled_from(CODE[:4]), max_size=2),
        ),
        st.tuples(st.just("read"), st.integers(0, 60)),
        st.tuples(st.just("wait"), st.sampled_from([1.0, 30.0, 70.0])),
    ),
    max_size=30,
)


@given(RUN_STEPS, st.integers(0, 5))
@settings(max_examples=100)
def test_ended_runs_stay_within_their_bounds_and_read_ones_go_first(steps: list[Any], max_history: int) -> None:
    clock, store = Clock(), Holdings()
    runs: Shelf[Any] = Shelf()
    retention = Retention(max_history, kept_bytes=100, artifact_bytes=60, share=0.5, result_ttl_s=100.0)
    ended = EndedRuns(runs, store, retention, clock)  # type: ignore[arg-type]  # it counts as one
    made: list[Any] = []
    kept_until: dict[str, float] = {}
    for what, *given_ in steps:
        before = dict(runs)
        newest = ""
        if what == "end":
            entry = ended_run(len(made), *given_)
            newest = entry.key
            entry.ended_at = clock.now
            made.append(entry)
            runs[newest] = entry
            store.hold(entry.artifacts)
            kept_until[newest] = clock.now + 100.0
            ended.add(entry)
        elif what == "read" and made:
            entry = made[given_[0] % len(made)]
            if kept_until.pop(entry.key, 0.0) == entry.ended_at + 100.0 and entry.artifacts:
                kept_until[entry.key] = clock.now + FETCH_S
            ended.note_read(entry)
        elif what == "wait":
            clock.now += given_[0]
        results = {run_id for run_id, until in kept_until.items() if until > clock.now}
        memory = {name: size for entry in runs.values() for name, size in pieces(entry)[0].items()}
        values = {name: size for entry in runs.values() for name, size in pieces(entry)[1].items()}
        check_usage(ended.memory, memory)
        check_usage(ended.values, values)
        assert +store.holders == Counter(a.artifact_id for entry in runs.values() for a in entry.artifacts)
        for usage, part in ((ended.memory, 0), (ended.values, 1)):
            spared = {t: sum(pieces(e)[part].values()) for e in made for t in [e.run.tenant] if e.key in runs}
            assert usage.total <= usage.bound.total + sum(spared.values())
            assert all(usage.of(tenant) <= usage.bound.of_tenant + spared.get(tenant, 0) for tenant in "abc")
        for run_id, entry in before.items():
            if run_id not in runs and run_id in results:
                rest = {r.key for r in runs.values() if r.run.tenant == entry.run.tenant}
                assert rest <= results, "a result was evicted before history"
        for key in before.keys() - runs.keys():
            run_id, _, tenant = key.partition(SEPARATOR)
            assert ended.fingerprint_of(run_id, Reach(tenant)) is not None


def pieces(entry: Any) -> tuple[dict[tuple[str, str], int], dict[tuple[str, str], int]]:
    """Return the sizes of a run in memory and in stores, by tenant and name."""
    tenant = entry.run.tenant
    memory = {(tenant, entry.key): entry.kept_bytes}
    for function in entry.functions.values():
        memory[tenant, function.digest] = function.size_bytes
        if function.bundle is not None:
            memory[tenant, function.bundle.digest] = function.bundle.size_bytes
    return memory, {(tenant, a.artifact_id): a.size_bytes for a in entry.artifacts}
