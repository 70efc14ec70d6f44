"""Owns the findings of `lattice doctor`, and how they are printed. Rule: an error or a warning says what to do."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from rich.text import Text

from lattice_client.cli.options import console, print_json
from lattice_client.cli.terminal import one_line, say

OK, WARNING, ERROR, SKIPPED = "ok", "warning", "error", "skipped"
STYLES = {OK: "green", WARNING: "yellow", ERROR: "red", SKIPPED: "dim"}


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a check.

    Attributes:
        area: `client`, `machine`, `server` or `cluster`.
        name: the checked part.
        status: `ok`, `warning`, `error`, or `skipped` for a check that could not be made.
        found: one line for people.
        advice: what to do; empty for `ok`.
    """

    area: str
    name: str
    status: str
    found: str
    advice: str = ""


def print_findings(findings: Iterable[Finding], as_json: bool) -> bool:
    """Print findings as they come; return whether none is an error."""
    counts = dict.fromkeys(STYLES, 0)
    area = ""
    for finding in findings:
        counts[finding.status] += 1
        if as_json:
            print_json(asdict(finding))
            continue
        if finding.area != area:
            say(finding.area)
            area = finding.area
        _print(finding)
    if not as_json:
        say(f"\n{_count(counts[ERROR], 'error')}, {_count(counts[WARNING], 'warning')}")
    return not counts[ERROR]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _print(finding: Finding) -> None:
    text = f"{one_line(finding.name)}: {one_line(finding.found)}"
    advice = f"            {one_line(finding.advice)}" if finding.advice else ""
    if not console.is_terminal:
        say(f"  {finding.status:<8}  {text}")
        if advice:
            say(advice)
        return
    console.print(Text.assemble("  ", (f"{finding.status:<8}", STYLES[finding.status]), "  ", text), soft_wrap=True)
    if advice:
        console.print(Text(advice, "bold"), soft_wrap=True)
