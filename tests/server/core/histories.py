"""Random histories of the scheduler's machine: everything it can be told, in any order, sensible or not."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lattice_server.core import messages
from lattice_server.core.messages import Assign, ExplainRequested, ServiceChanged, TaskExplained, TaskReady, WorkerHello
from lattice_server.core.model import (
    BatchPolicy,
    BatchScope,
    Capacity,
    Failure,
    FailureKind,
    Function,
    Gpu,
    OutputRef,
    Resources,
    RetryPolicy,
    TaskSpec,
)
from lattice_server.core.runtime import Runtime
from lattice_server.core.scheduling.needs import UNKNOWN
from tests.server.core.checked_scheduler import CheckedScheduler
from tests.server.core.graphs import SYNC, VALUE, hello, task
from tests.server.core.watcher import Watcher

GIB = 1 << 30
ASYNC = Function("sha256:async", is_async=True, definition=None)
OTHER = Function("sha256:other", is_async=False, definition=None)
NAMED = Function("sha256:named", is_async=False, definition=None, entrypoint="package:call")
FOREIGN = Function("sha256:foreign", is_async=False, definition=None, entrypoint="js/count")
NEWER = Function("sha256:newer", is_async=False, definition=None, runtime=Runtime("python", "3.12"))
STOPPED = Failure(FailureKind.CANCELLED, "stopped")
LIMITS = {"db": 2, "api": 1}
NODES = ["n1", "n2", "n3"]
SERVICES = ["m", "n", "m\nx", "n\nx", "m\ny", "n\ny"]
CONDITIONS = ["ready", "near", "not", "failed", "gone"]  # Of services.

resources = st.sampled_from(
    [
        Resources(1.0),
        Resources(1.0),
        Resources(0.5),
        Resources(0.0),
        Resources(4.0),
        Resources(1.0, memory_bytes=3 * GIB),
        Resources(0.1, gpu=0.3),
        Resources(1.0, gpu=0.5, gpu_memory_bytes=4 * GIB),
        Resources(1.0, gpu=1.0),
        Resources(0.0, gpu=2.0, gpu_memory_bytes=GIB),
        Resources(0.5, gpu_memory_bytes=5 * GIB),
    ]
)
batches = st.one_of(
    st.none(),
    st.builds(BatchPolicy, st.integers(1, 5), st.sampled_from([0.0, 0.01, 1.0]), st.sampled_from(list(BatchScope))),
)
retries = st.builds(
    RetryPolicy,
    max_attempts=st.integers(1, 3),
    initial_backoff_s=st.sampled_from([0.01, 1.0]),
    retry_on_types=st.sampled_from([frozenset(), frozenset({"Error"})]),
    max_worker_losses=st.integers(1, 3),
)
limited = st.one_of(
    st.sampled_from([("", 0), ("", 0), ("", 1), ("db", 0), ("db", 1), ("db", 5), ("api", 3), ("mine", 2)]),
    st.tuples(st.sampled_from(["session-1", "session-2", "session-3", "session-4"]), st.just(1)),
)
failures = st.builds(
    Failure,
    st.sampled_from(list(FailureKind)),
    st.just("broken"),
    type=st.sampled_from(["", "Error", "Other"]),
    base_types=st.sampled_from([(), ("Error",)]),
)
BOTH = ("js/count", "package:call")
own = st.sampled_from([(), (), (), ("js/count",), BOTH, ("js/other",)])
durations = st.sampled_from([0.0, 0.0001, 0.004, 1.0, -1.0, 1e12, float("nan"), float("inf")])


@st.composite
def specs(draw: st.DrawFn) -> TaskSpec:
    """A task of any kind, to be named."""
    key, most = draw(limited)
    made = task(
        "?",
        resources=draw(resources),
        retry=draw(retries),
        batch=draw(batches),
        concurrency_key=key,
        max_parallel=most,
        total_timeout_s=draw(st.sampled_from([None, None, 0.5, 5.0])),
        attempt_timeout_s=draw(st.sampled_from([None, 1.0])),
        node_selector=draw(st.sampled_from([(), (), (("zone", "a"),)])),
        services=draw(st.sampled_from([(), (), (), (), ("m",), ("m", "n")])),
    )
    return replace(made, function=draw(st.sampled_from([SYNC, SYNC, SYNC, OTHER, ASYNC, NAMED, FOREIGN, NEWER])))


class SchedulerHistories(RuleBasedStateMachine):
    """Tasks of many kinds and callers; workers that come, go, and report what they like."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = CheckedScheduler("e", session_ttl_s=5.0, limits=LIMITS)
        self.watcher = Watcher(self.machine, LIMITS)
        self.now = 0.0
        self.number = 0

    def tell(self, *events: Any) -> None:
        self.watcher.take(self.machine.handle_all(events, self.now))

    def lease(self, data: st.DataObject) -> tuple[Assign, int]:
        """Any lease that was ever handed out, and an item it may have; more often than not a new one."""
        recent = self.watcher.offered[-4:]
        lease = data.draw(st.one_of(st.sampled_from(recent), st.sampled_from(self.watcher.offered)))
        return lease, data.draw(st.integers(-1, len(lease.attempts)))

    @initialize()
    def a_node(self) -> None:
        self.tell(worker("n1", 4.0, 1))

    @rule(spec=specs(), run=st.sampled_from(["r", "s"]), tenant=st.sampled_from(["", "x", "y"]), data=st.data())
    def submit(self, spec: TaskSpec, run: str, tenant: str, data: st.DataObject) -> None:
        priority, rank = data.draw(st.integers(-1, 1)), data.draw(st.sampled_from([0.0, 0.0, 7.5]))
        split = data.draw(st.sampled_from([(), (), ("out",)]))
        self.tell(
            *[
                self.watcher.submit(
                    TaskReady(run, replace(spec, task_id=self.name()), {}, priority, "", tenant, rank, split)
                )
                for _ in range(data.draw(st.integers(1, 6)))
            ]
        )

    def name(self) -> str:
        self.number += 1
        return f"t{self.number}"

    @precondition(lambda self: self.watcher.submitted)
    @rule(data=st.data(), spec=specs(), many=st.integers(1, 3), alike=st.booleans())
    def submit_chain(self, data: st.DataObject, spec: TaskSpec, many: int, alike: bool) -> None:
        run, source = data.draw(st.sampled_from(list(self.watcher.submitted)))
        tenant = self.watcher.submitted[run, source].tenant
        if alike:
            spec = replace(self.watcher.submitted[run, source].spec, batch=None)
        events = []
        for _ in range(many):
            made = replace(spec, task_id=self.name(), inputs={"x": OutputRef(source, "out")})
            events.append(self.watcher.submit(TaskReady(run, made, made.inputs, 0, source, tenant)))
            source = made.task_id
        self.tell(*events)

    @rule(node=st.sampled_from(NODES), cpu=st.sampled_from([1.0, 4.0]), gpus=st.integers(0, 3), own=own)
    def join(self, node: str, cpu: float, gpus: int, own: tuple[str, ...]) -> None:
        self.tell(worker(node, cpu, gpus, own))

    @rule(
        key=st.sampled_from(["m", "n", "m\nx", "n\nx"]),
        condition=st.sampled_from(["ready", "near", "not", "failed", "gone"]),
    )
    def change_service(self, key: str, condition: str) -> None:
        failure = Failure(FailureKind.SERVICE_FAILED, "it cannot start") if condition == "failed" else None
        nodes = frozenset(NODES[:1]) if condition == "near" else None
        detail = UNKNOWN if condition == "gone" else ""
        self.tell(ServiceChanged(key, condition in {"ready", "near"}, nodes, detail, failure))

    @precondition(lambda self: self.watcher.offered)
    @rule(data=st.data(), duration=durations, outputs=st.sampled_from([{"out": VALUE}] * 4 + [{}]))
    def succeed(self, data: st.DataObject, duration: float, outputs: Any) -> None:
        lease, item = self.lease(data)
        split = data.draw(st.sampled_from([{"out": [VALUE]}, {"out": [VALUE]}, {}]))
        self.tell(messages.AttemptSucceeded(lease.session_id, lease.lease_id, item, outputs, duration, split))

    @precondition(lambda self: self.watcher.offered)
    @rule(data=st.data())
    def succeed_all(self, data: st.DataObject) -> None:
        lease, _ = self.lease(data)
        items = data.draw(st.permutations(range(len(lease.attempts))))
        self.tell(*[succeeded(lease, item) for item in items])

    @precondition(lambda self: self.watcher.offered)
    @rule(data=st.data(), failure=failures)
    def fail(self, data: st.DataObject, failure: Failure) -> None:
        lease, item = self.lease(data)
        self.tell(messages.AttemptFailed(lease.session_id, lease.lease_id, item, failure))

    @precondition(lambda self: self.watcher.offered)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        lease, item = self.lease(data)
        self.tell(messages.AttemptStarted(lease.session_id, lease.lease_id, item))

    @precondition(lambda self: self.watcher.offered)
    @rule(data=st.data(), refusal=st.sampled_from([None, Failure(FailureKind.PAYLOAD, "no")]))
    def write_and_spawn(self, data: st.DataObject, refusal: Failure | None) -> None:
        lease, item = self.lease(data)
        named = (lease.session_id, lease.lease_id, item)
        self.tell(
            messages.AttemptLogged(*named, False, "text", False),
            messages.AttemptSpawned(*named, (), refusal),
        )

    @precondition(lambda self: self.watcher.offered)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        lease, _ = self.lease(data)
        self.tell(messages.LeaseReturned(lease.session_id, lease.lease_id, ""))

    @precondition(lambda self: self.watcher.submitted)
    @rule(data=st.data(), failure=st.sampled_from([STOPPED, STOPPED, Failure(FailureKind.RESOURCES, "too many")]))
    def cancel(self, data: st.DataObject, failure: Failure) -> None:
        keys = data.draw(st.lists(st.sampled_from(list(self.watcher.submitted)), min_size=1, max_size=3))
        self.tell(*[messages.CancelRequested(run, (task_id, "nobody"), failure) for run, task_id in keys])

    @rule(node=st.sampled_from(NODES))
    def lose(self, node: str) -> None:
        self.tell(messages.WorkerLost(f"worker-of-{node}", "killed"))

    @rule(node=st.sampled_from(NODES), deadline_s=st.sampled_from([None, None, 0.0, 0.5]))
    def drain(self, node: str, deadline_s: float | None) -> None:
        self.tell(messages.DrainRequested(node, deadline_s))

    @precondition(lambda self: self.machine.nodes)
    @rule(data=st.data(), behind=st.integers(0, 2))
    def heartbeat(self, data: st.DataObject, behind: int) -> None:
        """A worker lists its leases, while newer assignments may still be on the way."""
        node = data.draw(st.sampled_from(list(self.machine.nodes.values())))
        ours = [lease_id for slot in node.slots.values() for lease_id in slot.lease_ids]
        held = frozenset(data.draw(st.lists(st.sampled_from([*ours, "unheard-of"]), unique=True)))
        on_its_way = {name for name in ours if self.machine.leases[name].sequence > node.assignments - behind}
        self.tell(messages.WorkerHeartbeat(node.session_id, held, node.assignments - behind))
        forgotten = set(ours) - held - on_its_way
        assert not forgotten.intersection(self.machine.leases), "what a worker has forgotten is still thought to run"
        assert on_its_way <= self.machine.leases.keys(), "what is on its way was given up"

    @precondition(lambda self: self.machine.nodes)
    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from(list(self.machine.nodes.values())))
        self.tell(messages.WorkerDetached(node.session_id))

    @precondition(lambda self: self.machine.nodes)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from(list(self.machine.nodes.values())))
        ours = [lease_id for slot in node.slots.values() for lease_id in slot.lease_ids]
        held = data.draw(st.lists(st.sampled_from([*ours, "unheard-of"]), unique=True))
        self.tell(hello(node.node_id, 4.0, node.session_id, held))

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.05, 1.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.tell()

    @rule()
    def wait_until_due(self) -> None:
        self.now = self.machine.next_deadline() or self.now
        self.tell()

    @precondition(lambda self: self.machine.tasks)
    @rule(data=st.data())
    def explain(self, data: st.DataObject) -> None:
        run, task_id = data.draw(st.sampled_from(list(self.machine.tasks)))
        effects = self.machine.handle(ExplainRequested(7, run, task_id), self.now)
        self.watcher.take(effects)
        (answer,) = [effect for effect in effects if isinstance(effect, TaskExplained)]
        assert answer.explanation is None or answer.explanation.reasons, "nobody can say why it waits"

    @invariant()
    def holds(self) -> None:
        self.watcher.check(self.now)

    def teardown(self) -> None:
        """With services, and nodes that can run anything and whose workers succeed in all, everything ends."""
        self.tell(*[ServiceChanged(key, is_ready=True) for key in SERVICES])
        # Drained nodes do not come back.
        new = [worker(node_id, 8.0, 3) for node_id in [*NODES, "z"]] + [worker("foreign", 8.0, 3, BOTH)]
        self.tell(*[replace(hello, worker_id=f"new-{hello.worker_id}") for hello in new])
        for _ in range(10 * len(self.watcher.submitted) + 10):
            if not self.machine.tasks:
                return
            for lease in [e for e in self.watcher.offered if e.lease_id in self.machine.leases]:
                self.tell(*[succeeded(lease, item) for item in range(len(lease.attempts))])
            self.now = self.machine.next_deadline() or self.now
            self.tell()
            self.watcher.check(self.now)
        why = [self.machine.handle(ExplainRequested(7, *key), self.now) for key in self.machine.tasks]
        raise AssertionError(f"never ends: {why}")


def worker(node_id: str, cpu: float, gpus: int, own: Sequence[str] = ()) -> WorkerHello:
    """A worker's greeting, of a node with GPUs and labels; `own` are the entry points it names."""
    devices = tuple(Gpu(index, "model", 8 * GIB) for index in range(gpus))
    capacity = Capacity(cpu, 4 * GIB, devices, slots=6, async_slots=4)
    labels = {"zone": "b" if node_id == "n2" else "a"}
    runtime = Runtime("python", "3.12.1" if node_id == "n1" else "3.1.2")
    more = {"labels": labels, "entrypoints": frozenset(own), "runtime": runtime}
    return replace(hello(node_id), capacity=capacity, **more)


def succeeded(lease: Assign, item: int, duration_s: float = 0.001) -> messages.AttemptSucceeded:
    """The report of a success."""
    named = (lease.session_id, lease.lease_id, item)
    return messages.AttemptSucceeded(*named, {"out": VALUE}, duration_s, {"out": [VALUE, VALUE]})
