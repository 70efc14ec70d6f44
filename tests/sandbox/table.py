"""The tables of docs/isolation.md that say what the tests try at each level, and how it ends.

Usage: python -m tests.sandbox.table, which writes them to the page.
"""

from pathlib import Path

from tests.sandbox import attempts, connections

PAGE = Path(__file__).resolve().parents[2] / "docs" / "isolation.md"
BEGIN, END = "<!-- Written by tests/sandbox/table.py. -->\n", "<!-- The end of the tables. -->\n"
WORDS = {"": "not claimed", attempts.REFUSED: "refused", attempts.DONE: "allowed", attempts.ENDED: "ended"}


def tables() -> str:
    """Return the tables as text."""
    lines = ["| attempt | `subprocess`, agent is root | `seccomp` and `docker` |", "|---|---|---|"]
    lines += [
        f"| {_words(name)} | {WORDS[found.subprocess]} | {WORDS[found.seccomp]} |"
        for name, found in attempts.ATTEMPTS.items()
    ]
    lines += [
        "",
        "With a list of servers, at each of these levels:",
        "",
        "| attempt | end | verdict in the run's events |",
    ]
    lines += ["|---|---|---|"]
    for name, row in connections.ROWS.items():
        verdict = f"`{row.access.rpartition(' ')[2]}`" if row.access else "none: it does not get to the proxy"
        lines.append(f"| {_words(name)} | {WORDS[row.outcome]} | {verdict} |")
    return "\n".join(lines) + "\n"


def written(page: str) -> str:
    """Return a page with the tables in their place."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.partition(END)[2]}"


def _words(name: str) -> str:
    return name.replace("_", " ")


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
