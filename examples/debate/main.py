"""A debate of agents whose graph grows while it runs: each round is added by the moderator of the one before.

    lattice run examples/debate/main.py [TOLERANCE]

Each debater knows the weather of Seattle in one year only, and estimates how many rainy days a year has. In each round
it hears the estimates of the others and moves towards them. The moderator adds another round until the estimates agree;
the number of rounds is not known beforehand.
"""

import csv
import sys
from pathlib import Path

from lattice_client import LatticeClient, context, task

WEATHER = Path(__file__).resolve().parent.parent / "agent" / "data" / "seattle-weather.csv"
YEARS = (2012, 2013, 2014, 2015)
STUBBORNNESS = 0.5


@task(cpu=0.1)
def study(source: str, year: int) -> float:
    """Return the rainy days of the only year that a debater has seen."""
    with open(source, newline="") as file:
        return float(
            sum(row["date"].startswith(str(year)) and float(row["precipitation"]) > 0 for row in csv.DictReader(file))
        )


@task(cpu=0.1)
def argue(own: float, heard: list[float]) -> float:
    """Return the estimate of a debater who has heard the others."""
    return STUBBORNNESS * own + (1 - STUBBORNNESS) * sum(heard) / len(heard)


@task(cpu=0.1)
def moderate(estimates: list[float], tolerance: float, round_number: int) -> str | None:
    """End the debate when the estimates agree, or add another round and the moderator after it."""
    spread = max(estimates) - min(estimates)
    context.emit(f"round {round_number}: " + " ".join(f"{estimate:.1f}" for estimate in estimates))
    if spread <= tolerance:
        return f"about {sum(estimates) / len(estimates):.0f} rainy days a year, after {round_number} rounds"
    debaters = [
        context.spawn(argue, {"own": own, "heard": [*estimates[:number], *estimates[number + 1 :]]})
        for number, own in enumerate(estimates)
    ]
    following = {"tolerance": tolerance, "round_number": round_number + 1}
    context.spawn(moderate, {"estimates": [debater.output for debater in debaters], **following})
    return None


def main() -> None:
    tolerance = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    with LatticeClient() as client:
        workflow = client.create_workflow("debate")
        first = [workflow.add_task(study, {"source": str(WEATHER), "year": year}, f"study-{year}") for year in YEARS]
        inputs = {"estimates": [debater.output for debater in first], "tolerance": tolerance, "round_number": 1}
        workflow.add_task(moderate, inputs)
        run = workflow.run()
        for chunk in run.chunks():
            print(chunk.value)
        # The moderators of all rounds are final tasks; only the last one has a verdict.
        (verdict,) = filter(None, (outputs["result"] for outputs in run.result().values()))
        print(verdict)
        print(f"{len(client.list_tasks(run))} tasks, of which the workflow had {len(workflow.tasks)}")


if __name__ == "__main__":
    main()
