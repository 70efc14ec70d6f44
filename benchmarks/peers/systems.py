"""The systems that are compared: their packages, their description, and the number of measurements."""

from collections.abc import Mapping
from dataclasses import dataclass, field

ALL = ("W1", "W2", "W3")


def _often() -> dict[str, int]:
    return {"W1": 20, "W2": 3, "W3": 2}


@dataclass(frozen=True, slots=True)
class System:
    """One system.

    Attributes:
        title: its name on the page.
        packages: what its virtual environment has; empty for the environment of this process.
        text: its description for the page: how it runs a task in these workloads, and the work that it leaves out.
        repeats: how often each workload is measured in a round.
        warm: the workloads that are done once before.
        max_rounds: in how many rounds it is measured at most.
    """

    title: str
    packages: tuple[str, ...]
    text: str
    repeats: Mapping[str, int] = field(default_factory=_often)
    warm: tuple[str, ...] = ALL
    max_rounds: int = 1000


SYSTEMS = {
    "lattice": System(
        "Lattice",
        (),
        "local executor, with as many CPUs as there are processors. A server, an agent and runners are processes. Each "
        "task is placed by its resources, and its events are recorded in memory and served to readers. There is no "
        "journal on disk.",
    ),
    "ray": System(
        "Ray",
        ("ray==2.60.0",),
        "tasks, with as many CPUs. They run in processes, on one or many machines. The caller submits a task with the "
        "futures of others; no graph is kept. Its dashboard, which shows the states of tasks, is off. A restart of Ray "
        "forgets all tasks.",
    ),
    "dask": System(
        "Dask",
        ("distributed==2026.8.0", "dask==2026.8.0"),
        "`LocalCluster`, with a process of one thread for each processor, and `Client.submit` and `Client.map` with "
        "futures. Tasks run in processes, on one or many machines. The scheduler keeps the graph in memory; a restart "
        "of it forgets all tasks.",
    ),
    "prefect": System(
        "Prefect",
        ("prefect==3.9.1",),
        "a flow, and a server of its own on this machine with SQLite, its default. Each state of a task is recorded in "
        "the database. Tasks run in 16 threads of the flow's process and share its GIL and its memory. By default "
        "there is a thread for each task; with 1,000 of them its server answered calls with status 503 on two busy "
        "processors. It is measured in one round only, because it takes long, and its first graph of 1,000 tasks "
        "counts.",
        repeats={"W1": 5, "W2": 1, "W3": 1},
        warm=("W1", "W2"),
        max_rounds=1,
    ),
    "langgraph": System(
        "LangGraph",
        ("langgraph==1.2.24",),
        "a graph is built, compiled and invoked, without a checkpointer. Nodes run in threads of the caller's process "
        "and share its GIL; for W3 one node is sent 1,000 values. It has no processes, no other machines and no "
        "resources.",
    ),
    "pool": System(
        "ProcessPoolExecutor",
        (),
        "of the standard library, with a process for each processor. It has no graphs: the caller waits for each step "
        "of a chain. A process that dies breaks the pool. Its figures are what pipes and pickle cost.",
    ),
}
