"""`python -m benchmarks.peers`: installs the compared systems, measures them alternately, and writes a page."""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.peers.environments import InstallError, environment, python_of
from benchmarks.peers.report import Comparison, write
from benchmarks.peers.systems import ALL, SYSTEMS

SIDES = Path(__file__).resolve().parent / "sides"
SIDE_S = 900
LAST_LINES = 20
# The comparison runs nothing in this time: the processor time belongs to other programs.
BUSY_S = 1.0


class SideError(Exception):
    """The program of a system failed."""


def measure(names: Sequence[str], rounds: int, workloads: Sequence[str] = ALL) -> Comparison:
    """Return the measurements of some systems, which alternate within every round. Raises InstallError, SideError."""
    pythons = {name: python_of(name, SYSTEMS[name]) for name in names}
    found = Comparison(_machine())
    for number in range(rounds):
        for name, python in pythons.items():
            if number >= SYSTEMS[name].max_rounds:
                continue
            found.busy.append(psutil.cpu_percent(interval=BUSY_S) / 100)
            line = json.loads(_run(name, python, workloads))
            found.add(name, line["samples"], line["versions"])
            print(f"round {number + 1}/{rounds} {name}", flush=True)
    return found


def _run(name: str, python: Path, workloads: Sequence[str]) -> str:
    """Run the program of a system; return the last line that it prints."""
    system = SYSTEMS[name]
    order = {
        "cpus": os.cpu_count() or 4,
        "warm": [workload for workload in system.warm if workload in workloads],
        "repeats": {workload: system.repeats[workload] for workload in workloads},
    }
    command = [str(python), str(SIDES / f"{name}_side.py"), json.dumps(order)]
    # Some systems leave files behind. The path is short, because sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="lp-") as folder:
        variables = {**environment(), "TMPDIR": folder}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=SIDE_S)
    if done.returncode != 0:
        lines = "\n".join(done.stderr.splitlines()[-LAST_LINES:])
        raise SideError(f"{system.title} failed with status {done.returncode}:\n{lines}")
    return done.stdout.splitlines()[-1]


def _machine() -> list[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB of memory"
    return [f"{os.cpu_count()} processors, {model}; {memory}", f"Linux {platform.release()}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="benchmarks.peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=[*SYSTEMS])
    parser.add_argument("--page", type=Path, default=Path("benchmarks/results/peers.md"))
    flags = parser.parse_args(arguments)
    try:
        found = measure([name for name in SYSTEMS if name in flags.only], flags.rounds)
    except (InstallError, SideError) as error:
        sys.exit(str(error))
    write(flags.page, found)


if __name__ == "__main__":
    main()
