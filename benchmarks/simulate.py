"""`python -m benchmarks.simulate`: compares orders of scheduling on generated workloads, in simulated time.

Owns which policies are compared. Rule: all of them schedule the same runs on the same nodes.
"""

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.clusters import LARGE, SMALL
from benchmarks.figures import Figures, average, figures_of, plot, table
from benchmarks.orders import critical_path, first_come, least_left, least_left_aged, oldest_run
from benchmarks.outcomes import Policy
from benchmarks.simulation import Simulation
from benchmarks.workloads import generate

ORDERS = {
    "first come": first_come,
    "oldest run": oldest_run,
    "critical path": critical_path,
    "least left": least_left,
    "least left, aged": least_left_aged,
}
# The others are compared with the first one: a single queue for all callers.
POLICIES = tuple(
    Policy(f"{name}, fair" if is_fair else name, order, is_fair)
    for is_fair in (False, True)
    for name, order in ORDERS.items()
)


def main() -> None:
    """Compare and report."""
    parser = argparse.ArgumentParser(prog="benchmarks.simulate")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="10 nodes, 5,000 tasks: seconds (the default)")
    size.add_argument("--large", action="store_true", help="100 nodes, 100,000 tasks: minutes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from --seed on, to average over")
    parser.add_argument("--only", nargs="*", metavar="POLICY", help="policies to compare, such as 'first come, fair'")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    flags = parser.parse_args()
    setting = LARGE if flags.large else SMALL
    policies = [policy for policy in POLICIES if flags.only is None or policy.name in flags.only]
    if not policies:
        parser.error(f"--only: the policies are {', '.join(repr(policy.name) for policy in POLICIES)}")
    rows = compare(policies, flags.large, range(flags.seed, flags.seed + flags.seeds))
    seeds = f"seed {flags.seed}" if flags.seeds == 1 else f"seeds {flags.seed} to {flags.seed + flags.seeds - 1}"
    title = f"{setting.nodes} nodes, {setting.tasks} tasks, {setting.callers + 1} callers, {seeds}"
    python = f"Python {platform.python_version()} on {platform.machine()}"
    flags.output.mkdir(parents=True, exist_ok=True)
    path = flags.output / f"simulation-{'large' if flags.large else 'small'}"
    path.with_suffix(".md").write_text(f"{title}; {python}\n\n{table(rows)}")
    path.with_suffix(".svg").write_text(plot(rows, title))
    print(f"{title}\n\n{table(rows)}")


def compare(policies: Sequence[Policy], is_large: bool, seeds: Sequence[int]) -> dict[str, Figures]:
    """Return the figures of each policy by its name, averaged over the seeds."""
    found: dict[str, list[Figures]] = {policy.name: [] for policy in policies}
    for seed in seeds:
        workload = generate(LARGE if is_large else SMALL, seed)
        for policy in policies:
            found[policy.name].append(figures_of(Simulation(workload, policy).run()))
            print(f"seed {seed}: {policy.name} done", file=sys.stderr, flush=True)
    return {name: average(rows) for name, rows in found.items()}


if __name__ == "__main__":
    main()
