"""A data analysis: load, clean, then statistics for each group and a regression side by side, then a report.

    lattice run examples/data_analysis/main.py

Values travel between tasks as plain lists and dicts, so every output can be read with `lattice runs watch`.
"""

import csv
import statistics
from pathlib import Path

from lattice_client import LatticeClient, task

SOURCE = Path(__file__).resolve().parent / "data" / "cars.csv"
ORIGINS = ("USA", "Europe", "Japan")
EXPLAIN = ("weight_kg", "horsepower", "displacement_l")
KG, LITRES, L_PER_100_KM = 0.45359237, 0.016387064, 235.214583


@task
def load(path: str) -> list[dict]:
    """Read a CSV file."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@task(outputs=["cars", "dropped"])
def clean(rows: list[dict]) -> dict:
    """Drop the cars that lack a number, and turn the others into metric units."""
    cars = [
        {
            "origin": row["origin"],
            "consumption": L_PER_100_KM / float(row["miles_per_gallon"]),
            "weight_kg": KG * float(row["weight_lbs"]),
            "horsepower": float(row["horsepower"]),
            "displacement_l": LITRES * float(row["displacement_cubic_inches"]),
        }
        for row in rows
        if row["miles_per_gallon"] and row["horsepower"]
    ]
    return {"cars": cars, "dropped": len(rows) - len(cars)}


@task
def summarize(cars: list[dict], origin: str) -> dict:
    """Return the consumption of the cars of one origin, in litres for 100 km."""
    used = [car["consumption"] for car in cars if car["origin"] == origin]
    low, median, high = statistics.quantiles(used, n=4)
    return {"origin": origin, "cars": len(used), "low": low, "median": median, "high": high}


@task
def regress(cars: list[dict], by: str) -> dict:
    """Fit a line through consumption over one property of the cars."""
    x, y = [car[by] for car in cars], [car["consumption"] for car in cars]
    slope, intercept = statistics.linear_regression(x, y)
    return {"by": by, "slope": slope, "intercept": intercept, "r_squared": statistics.correlation(x, y) ** 2}


@task
def report(groups: list[dict], lines: list[dict], dropped: int) -> str:
    """Put everything into a page of text, the best explanation first."""
    page = [
        f"Fuel consumption of {sum(group['cars'] for group in groups)} cars ({dropped} incomplete ones left out)",
        "",
    ]
    page += [f"{'origin':<10}{'cars':>5}{'quartile':>10}{'median':>10}{'quartile':>10}   l/100 km"]
    page += ["{origin:<10}{cars:>5}{low:>10.1f}{median:>10.1f}{high:>10.1f}".format(**group) for group in groups]
    page += ["", "consumption =        a +        b * property       R²"]
    for line in sorted(lines, key=lambda line: line["r_squared"], reverse=True):
        page += ["{intercept:>22.2f} + {slope:>8.4f} * {by:<15}{r_squared:>5.2f}".format(**line)]
    return "\n".join(page)


def main() -> None:
    with LatticeClient() as client:
        workflow = client.create_workflow("data analysis")
        rows = workflow.add_task(load, {"path": str(SOURCE)})
        cleaned = workflow.add_task(clean, {"rows": rows.output}).outputs
        groups = [workflow.add_task(summarize, {"cars": cleaned["cars"], "origin": origin}) for origin in ORIGINS]
        lines = [workflow.add_task(regress, {"cars": cleaned["cars"], "by": by}) for by in EXPLAIN]
        inputs = {"groups": [group.output for group in groups], "lines": [line.output for line in lines]}
        workflow.add_task(report, {**inputs, "dropped": cleaned["dropped"]})
        print(workflow.run().result()["result"])


if __name__ == "__main__":
    main()
