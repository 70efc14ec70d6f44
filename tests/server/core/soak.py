"""Runs random histories for as long as wanted: `python -m tests.server.core.soak SECONDS`.

Without an argument, LATTICE_SOAK_SECONDS says how long; without either, a minute. What fails is told with its history,
or, for a simulated cluster, with the seed that plays it again.
"""

import os
import sys
import time
from random import Random

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from tests.server.core.histories import SchedulerHistories
from tests.server.core.run_histories import RunHistories
from tests.server.core.worlds import World

ROUND = 200
LONG = settings(
    max_examples=ROUND,
    stateful_step_count=80,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


def soak(seconds: float) -> None:
    """Play histories until the time is over; raise the error of the first one that fails."""
    ends_at = time.monotonic() + seconds
    seeds = Random()
    played = {"scheduler": 0, "run": 0, "cluster": 0}
    machines: list[tuple[str, type[RuleBasedStateMachine]]] = [("scheduler", SchedulerHistories), ("run", RunHistories)]
    while time.monotonic() < ends_at:
        for name, machine in machines:
            run_state_machine_as_test(machine, settings=LONG)
            played[name] += ROUND
        for _ in range(ROUND):
            seed, latency_s = seeds.getrandbits(32), seeds.choice([0.0, 0.0005, 0.02, 0.3])
            try:
                World(seed, latency_s).play()
            except BaseException:
                print(f"World({seed}, {latency_s}).play() fails", file=sys.stderr)
                raise
            played["cluster"] += 1
    print(f"in {seconds:g} s: " + ", ".join(f"{count} histories of a {name}" for name, count in played.items()))


if __name__ == "__main__":
    soak(float(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("LATTICE_SOAK_SECONDS", "60")))
