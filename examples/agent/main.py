"""An agent: it plans, calls three tools side by side, and answers.

    lattice run examples/agent/main.py ["a question, another question, and another"]

The planner is plain code, not a language model: it needs no key and makes the same plan each time. The rest is
real: this project's documents, a SQLite database of measurements, arithmetic. Workers read the files where they are.
"""

import ast
import csv
import operator
import re
import sqlite3
import sys
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path

from lattice_client import LatticeClient, RunEvent, task

HERE = Path(__file__).resolve().parent
QUESTION = "How is a crash of user code contained, how many rainy days had Seattle in 2015, what is 365 * 24 / 7?"
TOOLS = ("topic", "sql", "formula")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
MEASURES = {"rainy": "count(*) filter (where precipitation > 0)", "warmest": "max(temp_max)"}


@task(outputs=TOOLS)
def plan(question: str) -> dict:
    """Give each part of the question to the tool that can answer it."""
    chosen = dict.fromkeys(TOOLS, "")
    for part in question.rstrip("?").split(","):
        words = re.findall(r"\w+", part.lower())
        measure = next((MEASURES[word] for word in words if word in MEASURES), None)
        if formula := re.search(r"[\d(][\d\s.()*/+-]*[*/+-][\d\s.()*/+-]*[\d)]", part):
            chosen["formula"] = formula.group()
        elif measure:
            year = next((word for word in words if re.fullmatch(r"20\d\d", word)), "20")
            chosen["sql"] = f"select {measure} from weather where date like '{year}%'"
        else:
            chosen["topic"] = part.strip()
    return chosen


@task
def search(folder: str, topic: str) -> str:
    """Return the paragraph of the documents that holds most of a topic's words; rare words weigh more."""
    files = [path for pattern in ("*.md", "docs/**/*.md") for path in Path(folder).glob(pattern)]
    passages = [(path.name, text) for path in files for text in re.split(r"\n\s*\n|\n- ", path.read_text())]
    stems = [{word[:5] for word in re.findall(r"[a-z]{4,}", text.lower())} for _, text in passages]
    spread = Counter(stem for found in stems for stem in found)
    wanted = {word[:5] for word in re.findall(r"[a-z]{4,}", topic.lower())}
    scores = [sum(1 / spread[stem] for stem in wanted & found) for found in stems]
    file, text = passages[scores.index(max(scores))]
    return f"{file}: {' '.join(text.split())}" if max(scores) else "nothing found"


@task
def query(source: str, database: str, sql: str) -> float | None:
    """Make a SQLite database of a CSV file, open it read-only and ask it."""
    with open(source, newline="") as file, closing(sqlite3.connect(database)) as connection, connection:
        header, *rows = csv.reader(file)
        connection.execute("drop table if exists weather")  # a first attempt may have left it
        connection.execute(f"create table weather ({', '.join(f'{name} numeric' for name in header)})")
        connection.executemany(f"insert into weather values ({', '.join('?' * len(header))})", rows)
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute(sql).fetchone()[0] if sql else None


@task
def calculate(formula: str) -> float | None:
    """Return the value of an arithmetic expression; anything else in it is an error."""

    def value(node: ast.expr) -> float:
        match node:
            case ast.BinOp(left, operation, right) if type(operation) in OPERATORS:
                return OPERATORS[type(operation)](value(left), value(right))
            case ast.Constant(int() | float() as number):
                return number
        raise ValueError(f"not arithmetic: {formula}")

    return value(ast.parse(formula.strip(), mode="eval").body) if formula else None


@task
def answer(asked: dict, found: dict) -> str:
    """Return each question with its answer."""
    return "\n\n".join(f"{asked[tool]}\n  → {found[tool]}" for tool in TOOLS if asked[tool])


def timeline(events: list[RunEvent]) -> None:
    """Print when each task ran, as the server saw it."""
    begin, end = events[0].time_s, events[-1].time_s
    started = {event.task_id: event.time_s - begin for event in events if event.type == "task_started"}
    finished = {event.task_id: event.time_s - begin for event in events if event.type == "task_succeeded"}
    for name, start_s in started.items():
        left, right = (round(50 * moment_s / (end - begin)) for moment_s in (start_s, finished[name]))
        bar = " " * left + "█" * max(1, right - left)
        print(f"{name:<10}{start_s * 1000:6.1f} to{finished[name] * 1000:6.1f} ms  {bar}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, LatticeClient() as client:
        workflow = client.create_workflow("agent")
        asked = workflow.add_task(plan, {"question": " ".join(sys.argv[1:]) or QUESTION}).outputs
        files = {"source": str(HERE / "data" / "seattle-weather.csv"), "database": f"{folder}/weather.sqlite"}
        passage = workflow.add_task(search, {"folder": str(HERE.parent.parent), "topic": asked["topic"]})
        fact = workflow.add_task(query, {**files, "sql": asked["sql"]})
        number = workflow.add_task(calculate, {"formula": asked["formula"]})
        found = {"topic": passage.output, "sql": fact.output, "formula": number.output}
        workflow.add_task(answer, {"asked": dict(asked), "found": found})
        run = workflow.run()
        timeline(list(run.events()))
        print(f"\n{run.result()['result']}")


if __name__ == "__main__":
    main()
