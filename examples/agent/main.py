"""An agent: plan, then three tools side by side, then an answer.

Run it with `lattice run examples/agent/main.py` while a server is up, or with `make demo`.
"""

import ast
import operator
import sqlite3
from pathlib import Path

from lattice_client import LatticeClient, task

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


@task(inputs=["question"], outputs=["words", "year", "formula"])
def plan(params):
    """Decide what each tool is to do."""
    words = [word.strip("?.,").lower() for word in params["question"].split() if len(word) > 4]
    return {"words": words, "year": 2025, "formula": "(17 + 25) * 2"}


@task
def search(folder: str, words: list) -> list:
    """Return the documents that hold most of the words, best first."""
    texts = {path.name: path.read_text().lower() for path in Path(folder).rglob("*.md")}
    scores = {name: sum(text.count(word) for word in words) for name, text in texts.items()}
    return sorted(scores, key=scores.get, reverse=True)[:3]


@task
def query(year: int) -> int:
    """Return the sum of a year's sales, from a SQLite database."""
    with sqlite3.connect(":memory:") as database:
        database.execute("create table sales (year integer, amount integer)")
        database.executemany("insert into sales values (?, ?)", [(2024, 310), (2025, 120), (2025, 95)])
        return database.execute("select sum(amount) from sales where year = ?", (year,)).fetchone()[0]


@task
def calculate(formula: str) -> float:
    """Return the value of an arithmetic expression."""

    def value(node):
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        return node.value

    return value(ast.parse(formula, mode="eval").body)


@task
def answer(question: str, documents: list, sales: int, number: float) -> str:
    """Put the findings into one sentence."""
    return f"{question} Read {documents[0]}; sales were {sales}; the number is {number}."


def main() -> None:
    question = "Which document explains worker processes?"
    docs = str(Path(__file__).resolve().parent.parent.parent / "docs")
    with LatticeClient() as client:
        workflow = client.create_workflow("agent")
        planned = workflow.add_task(plan, {"question": question})
        found = workflow.add_task(search, {"folder": docs, "words": planned.outputs["words"]})
        sales = workflow.add_task(query, {"year": planned.outputs["year"]})
        number = workflow.add_task(calculate, {"formula": planned.outputs["formula"]})
        inputs = {"documents": found.output, "sales": sales.output, "number": number.output}
        workflow.add_task(answer, {"question": question, **inputs})
        run = workflow.run()
        for event in run.events():
            print(f"{event.sequence:>3}  {event.type:<15} {event.task_id}")
        print(run.result()["result"])


if __name__ == "__main__":
    main()
