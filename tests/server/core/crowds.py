"""Crowds of tasks with many limits on few nodes, at random: most of them wait, and for every reason there is."""

import random
from dataclasses import replace

from lattice_server.core import messages
from lattice_server.core.messages import Assign, SchedulerEvent, TaskReady
from lattice_server.core.model import BatchPolicy, BatchScope, Capacity, Function, Gpu, Resources
from tests.server.core.checked_scheduler import CheckedScheduler
from tests.server.core.graphs import VALUE, hello, task
from tests.server.core.scenes import BROKEN, GIB, STOPPED

RESOURCES = [
    Resources(0.0),
    Resources(0.5),
    Resources(1.0),
    Resources(2.0, memory_bytes=3 * GIB),
    Resources(4.0),
    Resources(0.1, gpu=0.3),
    Resources(1.0, gpu=1.0),
    Resources(0.0, gpu=2.0),
]


class Crowd:
    """One history, made from a seed: some callers, some keys, some functions that are quick or not, and what befalls
    them."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.machine = CheckedScheduler("e", 5.0, {"db": 2, "api": 1})
        self.now = 0.0
        self.held: list[Assign] = []
        self.number = 0
        self.tenants = [f"caller-{number}" for number in range(rng.choice([1, 1, 2, 3, 8]))]
        self.keys = [*(f"session-{number}" for number in range(rng.choice([1, 3, 10, 40]))), "db", "api"]
        self.limits = [0, 1, 2, 5] if rng.random() < 0.3 else [rng.choice([1, 1, 2, 0])]
        self.resources = rng.sample(RESOURCES, rng.randint(1, 4))
        self.functions = [Function(f"sha256:{n}", rng.random() < 0.3, None) for n in range(rng.randint(1, 3))]
        self.took_s = {function.digest: rng.choice([0.0005, 0.001, 0.004, 0.5]) for function in self.functions}
        self.batched = rng.choice([0.0, 0.4])
        self.pace_s = rng.choice([0.001, 0.01, 0.1, 0.5])

    def play(self, steps: int = 120) -> None:
        """Let things happen."""
        weights = {self.submit: 6, self.succeed: 9, self.wait: 4, self.beat: 3, self.start: 2, self.tick_when_due: 2}
        weights |= dict.fromkeys([self.join, self.fail, self.cancel, self.give_back, self.lose, self.drain], 1)
        weights |= dict.fromkeys([self.detach, self.chain], 1)
        for _ in range(self.rng.randint(0, 2)):
            self.join()
        for happens in self.rng.choices(list(weights), list(weights.values()), k=steps):
            self.now += self.rng.random() * self.pace_s
            happens()

    def tell(self, *events: SchedulerEvent) -> None:
        """Tell the machine, and check it."""
        effects = self.machine.handle_all(events, self.now)
        self.machine.check()
        self.held += [effect for effect in effects if isinstance(effect, Assign)]
        self.held = [assign for assign in self.held if assign.lease_id in self.machine.leases]

    def some(self) -> list[Assign]:
        """Some of what workers hold."""
        return self.rng.sample(self.held, min(len(self.held), self.rng.choice([1, 1, 2, 4])))

    def submit(self) -> None:
        """Tasks become ready."""
        self.tell(*[self.ready() for _ in range(self.rng.choice([1, 1, 3, 10]))])

    def ready(self) -> TaskReady:
        """A task of any kind."""
        rng = self.rng
        key = rng.choice(self.keys) if rng.random() < 0.7 else ""
        limit = rng.choice(self.limits) if key or rng.random() < 0.1 else 0
        batch = None
        if rng.random() < self.batched:
            batch = BatchPolicy(rng.randint(1, 4), rng.choice([0.0, 0.01, 1.0]), rng.choice(list(BatchScope)))
        self.number += 1
        made = task(f"t{self.number}", batch=batch, concurrency_key=key, max_parallel=limit)
        spec = replace(made, function=rng.choice(self.functions), resources=rng.choice(self.resources))
        order = (rng.choice([0, 0, 0, 1, -1]), "", rng.choice(self.tenants), rng.choice([0.0, 0.0, 3.5, -1.0]))
        return TaskReady(rng.choice("rs"), spec, {}, *order)

    def chain(self) -> None:
        """A task is handed over that waits for another."""
        if self.machine.tasks:
            source = self.rng.choice(list(self.machine.tasks.values())).ready
            self.number += 1
            spec = replace(source.spec, task_id=f"t{self.number}", batch=None)
            self.tell(replace(source, spec=spec, after=source.spec.task_id))

    def succeed(self) -> None:
        """Workers report successes."""
        self.tell(
            *[
                messages.AttemptSucceeded(
                    lease.session_id, lease.lease_id, item, {"out": VALUE}, self.took_s[lease.function.digest], {}
                )
                for lease in self.some()
                for item in range(len(lease.attempts))
            ]
        )

    def fail(self) -> None:
        """Workers report failures."""
        self.tell(*[messages.AttemptFailed(lease.session_id, lease.lease_id, 0, BROKEN) for lease in self.some()])

    def start(self) -> None:
        """Workers report starts."""
        self.tell(*[messages.AttemptStarted(lease.session_id, lease.lease_id, 0) for lease in self.some()])

    def give_back(self) -> None:
        """Workers return leases that have not started."""
        self.tell(*[messages.LeaseReturned(lease.session_id, lease.lease_id, "") for lease in self.some()])

    def cancel(self) -> None:
        """A caller cancels a task."""
        if self.machine.tasks:
            run, task_id = self.rng.choice(list(self.machine.tasks))
            self.tell(messages.CancelRequested(run, (task_id,), STOPPED))

    def join(self) -> None:
        """A worker connects, or connects again."""
        gpus = tuple(Gpu(index, "model", 8 * GIB) for index in range(self.rng.choice([0, 0, 1, 2])))
        slots = self.rng.choice([1, 2, 6])
        capacity = Capacity(self.rng.choice([1.0, 2.0, 4.0]), 4 * GIB, gpus, slots, async_slots=4)
        self.tell(replace(hello(self.node_id()), capacity=capacity))

    def node_id(self) -> str:
        """Any node."""
        return f"n{self.rng.randint(0, 3)}"

    def lose(self) -> None:
        """A worker may die."""
        self.tell(messages.WorkerLost(f"worker-of-{self.node_id()}", "killed"))

    def drain(self) -> None:
        """A node may be drained."""
        self.tell(messages.DrainRequested(self.node_id(), self.rng.choice([None, 0.5])))

    def detach(self) -> None:
        """A worker's stream may break."""
        if node := self.machine.nodes.get(self.node_id()):
            self.tell(messages.WorkerDetached(node.session_id))

    def beat(self) -> None:
        """A worker says that it is there."""
        if node := self.machine.nodes.get(self.node_id()):
            held = frozenset(lease_id for slot in node.slots.values() for lease_id in slot.lease_ids)
            self.tell(messages.WorkerHeartbeat(node.session_id, held, node.assignments))

    def wait(self) -> None:
        """Time passes."""
        self.now += self.rng.choice([0.0, 0.01, 0.02, 0.05, 0.1, 1.0])
        self.tell()

    def tick_when_due(self) -> None:
        """Time passes until something is due."""
        self.now = max(self.now, self.machine.next_deadline() or self.now)
        self.tell()
