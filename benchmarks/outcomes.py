"""Owns the inputs and the outcome of a simulation. Rule: only simulated quantities are compared."""

from dataclasses import dataclass, field

from benchmarks.orders import Order


@dataclass(frozen=True, slots=True)
class Policy:
    """How a simulation schedules: the order among the tasks of one caller, and whether callers share fairly."""

    name: str
    order: Order
    is_fair: bool


@dataclass(frozen=True, slots=True)
class EndedRun:
    """How long a run took, and how long it would have taken alone on an endless cluster."""

    caller: str
    kind: str
    completion_s: float
    critical_path_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one simulation. `cpu` and `gpu` are used shares of the cluster. The seconds that the machines took
    are real processor time: other programs do not count, and still no two measurements agree."""

    runs: tuple[EndedRun, ...]
    tasks: int
    makespan_s: float
    cpu: float
    gpu: float
    scheduler_s: float = field(compare=False)
    orchestrator_s: float = field(compare=False)
