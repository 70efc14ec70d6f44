"""The table of docs/langgraph.md, made from the scenarios. `python -m tests.e2e.graphs.table` writes it anew."""

from pathlib import Path

from tests.e2e.graphs import control, nesting, reaching
from tests.e2e.graphs.cases import CASES

PAGE = Path(__file__).resolve().parents[3] / "docs" / "langgraph.md"
BEGIN, END = "<!-- begin of the table of scenarios -->\n", "<!-- end of the table of scenarios -->\n"
MODULES = (control, nesting, reaching)  # their import adds the scenarios


def table() -> str:
    """Return the table."""
    rows = ["| feature | synchronous callers | asyncio |", "|---|---|---|"]
    # A test may have imported one of the modules before.
    order = [module.__name__ for module in MODULES]
    for case in sorted(CASES.values(), key=lambda case: order.index(case.scenario.__module__)):
        has = ["same result" if caller in case.callers else "—" for caller in ("sync", "async")]
        rows.append(f"| {case.feature} | {' | '.join(has)} |")
    return "\n".join(rows) + "\n"


def page_with_table(text: str) -> str:
    """Return the text of the page with the present table."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text()))
