"""The breaks of `tests/mutants.txt` are of lines that exist, so that `scripts/mutants.py` can try all of them."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_mutants_change_lines_that_exist() -> None:
    found = runpy.run_path(str(ROOT / "scripts" / "mutants.py"))["mutants"]()
    assert all(mutant.keys() == {"file", "line", "then", "test"} for mutant in found)
    assert all(mutant["line"] != mutant["then"] for mutant in found)
