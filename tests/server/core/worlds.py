"""Random worlds: graphs, what their tasks do, and what befalls the cluster; told by a seed, on a virtual clock."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from random import Random
from typing import Any
from zlib import crc32

from lattice_server.core.errors import LatticeError
from lattice_server.core.messages import Assign, AttemptInputs, DrainRequested, RunFinished, TaskStarted
from lattice_server.core.model import (
    BatchPolicy,
    BatchScope,
    Binding,
    BindingList,
    Capacity,
    Condition,
    Failure,
    FailureKind,
    FailurePolicy,
    Function,
    Gpu,
    OutputRef,
    Outputs,
    Payload,
    Resources,
    RetryPolicy,
    TaskSpec,
    WorkflowSpec,
)
from lattice_server.core.references import resolve
from lattice_server.core.run.bindings import NULL
from lattice_server.core.run.limits import Bounds
from lattice_server.core.run.run import Run
from lattice_server.core.states import TaskState
from tests.server.core.cluster import Cluster, value
from tests.server.core.graphs import hello
from tests.server.core.workers import Outcome

GIB = 1 << 30
CODE = [Function(f"sha256:{n}", is_async=n == "async", definition=None) for n in ("f", "g", "h", "async")]
FOREIGN = Function("sha256:foreign", is_async=False, definition=None, entrypoint="js/count")
FUNCTIONS = [*CODE, *CODE, FOREIGN]
NEEDS = [
    *[Resources(1.0)] * 6,
    Resources(0.5),
    Resources(3.0),
    Resources(1.0, 2 * GIB),
    Resources(0.5, gpu=0.5),
    Resources(1.0, gpu=1.0),
    Resources(0.5, gpu=2.0),
    Resources(0.5, gpu_memory_bytes=5 * GIB),
]
SECONDS = [0.0003, 0.001, 0.001, 0.008, 0.3, 1.5]
LIMITS = {"db": 2}
TROUBLE_S = 20.0
TROUBLES = ["kill", "detach", "resume", "drain", "join", "cancel", "cancel task", "append", "restart"]


class World:
    """One cluster and a few runs on it, all of it from one seed."""

    def __init__(self, seed: int, latency_s: float = 0.0) -> None:
        self.rng = Random(seed)
        self.cluster = Cluster(self.behave, limits=LIMITS, latency_s=latency_s)
        self.attempts: Counter[tuple[str, str]] = Counter()
        self.begun: set[tuple[str, str, int]] = set()
        self.work_s = 0.0
        self.numbers = count(1)

    def play(self) -> None:
        """Start everything, let trouble come for a while, then let things end."""
        rng, cluster = self.rng, self.cluster
        for node_id in ("n1", "n2", "n4"):
            self.join(node_id)
        for number in range(rng.randint(1, 4)):
            cluster.after(rng.uniform(0, 3), lambda n=number: self.start(f"r{n}"))  # type: ignore[misc]
        for _ in range(rng.randint(0, 12)):
            cluster.after(rng.uniform(0, TROUBLE_S), self.trouble)
        cluster.go_on(most_s=TROUBLE_S)
        for node_id in ("n1", "n2", "n3", "n4"):
            node = cluster.machine.nodes.get(node_id)
            # A node that works is left as it is: a lease that never ends must not be repaired by its loss.
            if node is None or not node.takes_work:
                self.join(node_id)
        most_s = 2 * TROUBLE_S + self.work_s + 60
        cluster.go_on(self.is_over, most_s=most_s)
        assert self.is_over(), f"not over after {most_s:.0f} s: {list(cluster.machine.tasks)[:5]}"
        cluster.go_on(most_s=cluster.now + 10)
        self.check_end()

    def is_over(self) -> bool:
        return bool(self.cluster.runs) and all(run.is_terminal for run in self.cluster.runs.values())

    def check_end(self) -> None:
        """Everything ended once, nothing is held any more, and every result is what its inputs make it."""
        cluster = self.cluster
        assert not cluster.machine.tasks
        assert not cluster.machine.leases
        for run_id, run in cluster.runs.items():
            facts = [fact for _, fact in cluster.facts[run_id]]
            assert isinstance(facts[-1], RunFinished)
            assert sum(isinstance(fact, RunFinished) for fact in facts) == 1
            for task_id, record in run.tasks.items():
                if record.state is TaskState.SUCCEEDED and record.items is None:
                    inputs = {name: resolve(b, partial(value_in, run)) for name, b in record.spec.inputs.items()}
                    assert record.outputs is not None
                    assert record.outputs["out"] == outputs_of(task_id, inputs)["out"]

    # What happens.

    def join(self, node_id: str) -> None:
        gpus = tuple(Gpu(i, "model", 8 * GIB) for i in range(2))
        capacity = Capacity(4.0, 4 * GIB, gpus, slots=8, async_slots=8)
        # One node has another language and runs only its entry points.
        own = frozenset({FOREIGN.entrypoint} if node_id == "n4" else ())
        # A worker that was drained does not come back; another process is another worker.
        worker_id = f"worker-{next(self.numbers)}-of-{node_id}"
        self.cluster.join(replace(hello(node_id), worker_id=worker_id, capacity=capacity, entrypoints=own))

    def start(self, run_id: str) -> None:
        spec = random_workflow(self.rng, self.rng.randint(1, 12))
        self.cluster.start(run_id, spec, tenant=self.rng.choice(["", "x", "y"]), bounds=Bounds(200, 6, 2))

    def trouble(self) -> None:
        rng, cluster = self.rng, self.cluster
        node_id = rng.choice(["n1", "n2", "n3", "n4"])
        run = rng.choice(list(cluster.runs.values())) if cluster.runs else None
        match rng.choice([*TROUBLES, "append"]):
            case "kill" if node_id in cluster.workers:
                cluster.kill(node_id)
            case "detach" if node_id in cluster.workers:
                cluster.detach(node_id)
                cluster.after(rng.choice([0.01, 1.0, 8.0]), lambda: self.resume(node_id))
            case "restart":
                self.restart()
            case "drain":
                cluster._post(DrainRequested(node_id, rng.choice([None, 0.0, 0.3])))
            case "join" if node_id not in cluster.workers:
                self.join(node_id)
            case "cancel" if run and rng.random() < 0.3:
                cluster.perform(run, run.cancel("enough", cluster.now))
            case "cancel task" if run:
                cluster.perform(run, run.cancel_task(rng.choice(list(run.tasks)), "enough", cluster.now))
            case "append" if run:
                known = [record.spec for record in run.tasks.values()]
                added: list[TaskSpec] = []
                for number in range(rng.randint(1, 3)):
                    added.append(random_task(rng, f"a{len(run.tasks) + number}", [*known, *added]))
                try:
                    cluster.perform(run, run.append(rng.sample(added, len(added)), cluster.now))
                except LatticeError:
                    run.check()

    def restart(self) -> None:
        """Kill the server and start it again; workers dial again later, if they live until then."""
        cluster = self.cluster
        cluster.restart()
        # An attempt whose start was not recorded is forgotten, and the next one has its number.
        started = {
            (run_id, fact.task_id, fact.attempt)
            for run_id, facts in cluster.facts.items()
            for _, fact in facts
            if isinstance(fact, TaskStarted)
        }
        self.begun &= started
        for node_id in list(cluster.workers):
            cluster.after(self.rng.choice([0.01, 1.0, 8.0]), lambda n=node_id: self.resume(n))  # type: ignore[misc]

    def resume(self, node_id: str) -> None:
        if node_id in self.cluster.workers:
            self.cluster.resume(node_id)

    def behave(self, assign: Assign, attempt: AttemptInputs, inputs: Mapping[str, Binding]) -> Outcome:
        rng = self.rng
        key = (attempt.run_id, attempt.task_id)
        assert (*key, attempt.attempt) not in self.begun, "an attempt number runs twice"
        self.begun.add((*key, attempt.attempt))
        self.attempts[key] += 1
        seconds = rng.choice(SECONDS)
        self.work_s += seconds
        if crc32(repr(key).encode()) % 25 == 0:
            return Outcome(seconds, failure=Failure(FailureKind.CRASHED, "poison"))
        if rng.random() < 0.08:
            kind = rng.choice([FailureKind.USER_ERROR, FailureKind.TIMEOUT, FailureKind.PAYLOAD])
            return Outcome(seconds, failure=Failure(kind, "broken", type="Error"))
        tasks: tuple[Any, ...] = ()
        if rng.random() < 0.08:
            run = self.cluster.runs[attempt.run_id]
            names = [f"{attempt.task_id}/{n}" for n in range(2)]
            tasks = tuple(random_task(rng, name, [record.spec for record in run.tasks.values()]) for name in names)
        outputs = outputs_of(attempt.task_id, inputs)
        split = {name: items_of(outputs[name]) for name in assign.split_outputs}
        return Outcome(seconds, outputs, split, tasks=tasks)


def random_workflow(rng: Random, size: int) -> WorkflowSpec:
    """A graph of such tasks, in any order."""
    tasks: list[TaskSpec] = []
    for number in range(size):
        tasks.append(random_task(rng, f"t{number}", tasks))
    return WorkflowSpec(tuple(rng.sample(tasks, size)), failure_policy=rng.choice(list(FailurePolicy)))


def random_task(rng: Random, task_id: str, earlier: list[TaskSpec]) -> TaskSpec:
    """A task of any kind that may need, map over, or hang on earlier ones."""
    sources = rng.sample(earlier, min(len(earlier), rng.choice([0, 1, 1, 2, 3])))
    inputs: dict[str, Binding] = {
        f"i{n}": OutputRef(source.task_id, "out", rng.random() < 0.25) for n, source in enumerate(sources)
    }
    over = ""
    if sources and rng.random() < 0.2:
        inputs["i0"] = OutputRef(sources[0].task_id, "out")
        over = "i0"
    condition = None
    plain = [spec for spec in earlier if not spec.over]
    if plain and rng.random() < 0.2:
        equals = value("1") if rng.random() < 0.5 else None
        condition = Condition(OutputRef(rng.choice(plain).task_id, "flag"), equals, rng.random() < 0.5)
    batch = BatchPolicy(rng.randint(1, 4), rng.choice([0.0, 0.2]), rng.choice(list(BatchScope)))
    return TaskSpec(
        task_id,
        rng.choice(FUNCTIONS),
        inputs=inputs,
        outputs=("out", "flag"),
        after=tuple(spec.task_id for spec in rng.sample(earlier, min(len(earlier), rng.choice([0, 0, 1])))),
        resources=rng.choice(NEEDS),
        retry=RetryPolicy(rng.randint(1, 3), 0.05),
        total_timeout_s=rng.choice([None, None, None, 3.0]),
        priority=rng.choice([0, 0, 1]),
        batch=batch if rng.random() < 0.3 else None,
        max_parallel=rng.choice([0, 0, 0, 1, 2]),
        concurrency_key=rng.choice(["", "", "db"]),
        over=over,
        condition=condition,
    )


def outputs_of(task_id: str, inputs: Mapping[str, Binding]) -> Outputs:
    """The outputs of a task: a list that depends on its inputs, and a number from 0 to 2."""
    told = repr((task_id, sorted(inputs.items())))
    digest = crc32(told.encode())
    items = [f"{digest}-{index}" for index in range(digest % 5)]
    return {"out": value(json.dumps(items)), "flag": value(str(digest % 3))}


def items_of(payload: Payload) -> list[Payload]:
    """The items of a list, each a value of its own."""
    assert isinstance(payload.content, str)
    return [value(json.dumps(item)) for item in json.loads(payload.content)]


def value_in(run: Run, reference: Any) -> Binding:
    """The value of a reference in a run that has ended, computed anew."""
    record = run.tasks[reference.task_id]
    assert reference.is_optional or record.state is TaskState.SUCCEEDED
    if record.items is None:
        return NULL if record.outputs is None else record.outputs[reference.output]
    items = [run.tasks[item].outputs for item in record.items]
    return BindingList(tuple(NULL if outputs is None else outputs[reference.output] for outputs in items))
