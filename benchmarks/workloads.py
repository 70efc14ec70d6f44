"""Owns the workload of a simulation: a cluster, its callers and their runs. Rule: one seed gives one workload.

Each caller comes in bursts with a mix of runs of its own. One caller, the crowd, starts besides that a run of a quarter
of all tasks and, later, a swarm: a twentieth of all tasks as runs of one task each, all at once. Facts that
the machines cannot know beforehand (durations, lengths of lists, the rounds of an agent) are drawn here, and reach them
only through the simulated workers.
"""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count

from benchmarks.clusters import Setting, cluster
from benchmarks.shapes import KINDS, TOOLS, Kind
from lattice_server.core.messages import WorkerHello
from lattice_server.core.model import BatchPolicy, Function, OutputRef, TaskSpec, WorkflowSpec

CROWD = "crowd"  # The caller with as much as a third of all work.
CROWD_COMES = {"crowd": 0.2, "swarm": 0.4}  # When, as a share of the time in which runs arrive.


@dataclass(frozen=True, slots=True)
class Arrival:
    """One run to come. `durations` holds seconds by task id, `growth` the tasks that a task adds while it runs, and
    `lengths` how many items a task's output `out` has for those mapped over it. `critical_path_s` is how long the run
    takes when nothing ever waits."""

    at_s: float
    run_id: str
    caller: str
    kind: str
    spec: WorkflowSpec
    durations: Mapping[str, float]
    growth: Mapping[str, tuple[TaskSpec, ...]]
    lengths: Mapping[str, int]
    critical_path_s: float


@dataclass(frozen=True, slots=True)
class Workload:
    """All of one simulation."""

    setting: Setting
    nodes: tuple[WorkerHello, ...]
    arrivals: tuple[Arrival, ...]


@dataclass(slots=True)
class _Draft:
    """A run while it is drawn."""

    caller: str
    dice: random.Random
    tasks: list[TaskSpec] = field(default_factory=list)
    durations: dict[str, float] = field(default_factory=dict)
    growth: dict[str, tuple[TaskSpec, ...]] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    work: list[tuple[Kind, float]] = field(default_factory=list)
    critical_path_s: float = 0.0

    def spec(self, task_id: str, kind: str, needs: tuple[str, ...] = (), **settings: object) -> TaskSpec:
        shape = KINDS[kind]
        return TaskSpec(
            task_id,
            Function(f"{self.caller}/{kind}", shape.is_async, definition=None),
            inputs={f"input_{source}": OutputRef(source, "out") for source in needs},
            outputs=("out",),
            resources=shape.resources,
            **settings,  # type: ignore[arg-type]  # by name
        )

    def seconds(self, task_id: str, kind: str) -> float:
        shape = KINDS[kind]
        drawn = self.durations[task_id] = self.dice.lognormvariate(math.log(shape.median_s), shape.spread)
        self.work.append((shape, drawn))
        return drawn

    def round(self, number: int, after: tuple[str, ...], last: str) -> list[TaskSpec]:
        """Return some parallel tools and the step that reads their results."""
        names = self.dice.choices(list(TOOLS), weights=list(TOOLS.values()), k=self.dice.randint(2, 5))
        tools = [self.spec(f"tool_{number}_{i}", name, after) for i, name in enumerate(names)]
        slowest_s = max(self.seconds(tool.task_id, name) for tool, name in zip(tools, names, strict=True))
        self.critical_path_s += slowest_s + self.seconds(last, "think")
        return [*tools, self.spec(last, "think", tuple(tool.task_id for tool in tools))]

    def map(self, source: str, kind: str, length: int, batch: BatchPolicy | None = None) -> TaskSpec:
        """Return a task mapped over the output of `source`, which has `length` items."""
        self.lengths[source] = length
        self.critical_path_s += max(self.seconds(f"{kind}[{index}]", kind) for index in range(length))
        return self.spec(kind, kind, (source,), over=f"input_{source}", batch=batch)


def _agent(draft: _Draft, setting: Setting) -> None:
    draft.critical_path_s = draft.seconds("plan", "think")
    draft.tasks = [draft.spec("plan", "think"), *draft.round(0, ("plan",), "answer")]


def _loop(draft: _Draft, setting: Setting) -> None:
    """Draw an agent that decides in each round whether to go round again: the graph grows as it goes."""
    draft.critical_path_s = draft.seconds("decide_0", "think")
    draft.tasks = [draft.spec("decide_0", "think")]
    for number in range(draft.dice.randint(2, 6)):
        draft.growth[f"decide_{number}"] = tuple(draft.round(number, (), f"decide_{number + 1}"))


def _ingestion(draft: _Draft, setting: Setting) -> None:
    batch = BatchPolicy(max_size=16, max_wait_s=0.05) if draft.dice.random() < 0.5 else None
    draft.critical_path_s = draft.seconds("load", "load") + draft.seconds("index", "index")
    embed = draft.map("load", "embed", draft.dice.randint(*setting.chunks), batch)
    draft.tasks = [draft.spec("load", "load"), embed, draft.spec("index", "index", ("embed",))]


def _single(draft: _Draft, setting: Setting) -> None:
    draft.critical_path_s = draft.seconds("task", "code")
    draft.tasks = [draft.spec("task", "code")]


def _report(draft: _Draft, setting: Setting) -> None:
    """Draw a chain beside many independent parts, joined at the end; a late start of the chain delays the end."""
    chain = [f"step_{number}" for number in range(draft.dice.randint(3, 6))]
    parts = [f"part_{number}" for number in range(draft.dice.randint(10, 30))]
    draft.tasks = [draft.spec(part, "code") for part in parts]
    for number, step in enumerate(chain):
        draft.tasks.append(draft.spec(step, "code", tuple(chain[max(0, number - 1) : number])))
    draft.tasks.append(draft.spec("join", "think", (*parts, chain[-1])))
    longest_s = max([draft.seconds(part, "code") for part in parts])
    chain_s = sum(draft.seconds(step, "code") for step in chain)
    draft.critical_path_s = max(longest_s, chain_s) + draft.seconds("join", "think")


def _crowd(draft: _Draft, setting: Setting) -> None:
    draft.critical_path_s = draft.seconds("list", "parse")
    draft.tasks = [
        draft.spec("list", "parse"),
        draft.map("list", "evaluate", max(1, int(setting.crowd * setting.tasks))),
    ]


Draw = Callable[[_Draft, Setting], None]

# The kinds of runs, and their shares of all tasks besides the crowd's.
MIX: dict[str, tuple[Draw, float]] = {
    "agent": (_agent, 0.35),
    "loop": (_loop, 0.15),
    "report": (_report, 0.14),
    "ingestion": (_ingestion, 0.32),
    "single": (_single, 0.04),
}


def generate(setting: Setting, seed: int) -> Workload:
    """Return the workload of a seed."""
    dice = random.Random(seed)
    nodes = cluster(setting)
    # A few callers do much, many do little, as everywhere.
    callers = {f"caller-{index}": 1.0 / (index + 1) ** 0.7 for index in range(setting.callers)}
    callers[CROWD] = 0.3
    drafts: list[tuple[str, _Draft]] = []
    crowd: list[tuple[str, Draw]] = [("crowd", _crowd), *[("swarm", _single)] * int(setting.swarm * setting.tasks)]
    for kind, draw in crowd:
        drafts.append((kind, _Draft(CROWD, dice)))
        draw(drafts[-1][1], setting)
    rest = setting.tasks - sum(len(draft.durations) for _, draft in drafts)
    for kind, (draw, share) in MIX.items():
        wanted = share * rest
        while wanted > 0:
            draft = _Draft(dice.choices(list(callers), weights=list(callers.values()))[0], dice)
            draw(draft, setting)
            wanted -= len(draft.durations)
            drafts.append((kind, draft))
    span_s = _span_s(setting, nodes, [draft for _, draft in drafts])
    return Workload(setting, nodes, tuple(_arrivals(drafts, span_s, dice)))


def _arrivals(drafts: list[tuple[str, _Draft]], span_s: float, dice: random.Random) -> list[Arrival]:
    bursts: dict[str, list[float]] = {}
    found = []
    for kind, draft in drafts:
        starts = bursts.get(draft.caller)
        if starts is None:
            starts = bursts[draft.caller] = [dice.uniform(0.0, span_s) for _ in range(dice.randint(2, 6))]
        at_s = min(span_s, dice.choice(starts) + dice.expovariate(20.0 / span_s))
        if kind in CROWD_COMES:
            at_s = CROWD_COMES[kind] * span_s
        found.append((at_s, kind, draft))
    numbers = count(1)
    return [
        Arrival(
            at_s,
            f"run-{next(numbers)}",
            draft.caller,
            kind,
            WorkflowSpec(tuple(draft.tasks)),
            draft.durations,
            draft.growth,
            draft.lengths,
            draft.critical_path_s,
        )
        for at_s, kind, draft in sorted(found, key=lambda entry: entry[0])
    ]


def _span_s(setting: Setting, nodes: tuple[WorkerHello, ...], drafts: list[_Draft]) -> float:
    cpu_s = sum(kind.resources.cpu * seconds for draft in drafts for kind, seconds in draft.work)
    gpu_s = sum(kind.resources.gpu * seconds for draft in drafts for kind, seconds in draft.work)
    cpus = sum(node.capacity.cpu for node in nodes)
    gpus = sum(len(node.capacity.gpus) for node in nodes)
    return max(cpu_s / cpus, gpu_s / gpus) / setting.load
