"""The pages name files, folders and headings that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")])
# Names of files in back quotes that begin with a folder of the project.
NAMED = re.compile(r"`((?:lattice_(?:client|server|worker)|proto|tests|docs|examples|benchmarks|scripts)/[\w./-]+)`")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_files_and_headings_that_exist(page: Path) -> None:
    text = page.read_text()
    missing = [name for name in NAMED.findall(text) if not (ROOT / name).exists()]
    for target, anchor in LINK.findall(text):
        found = (page.parent / target).resolve() if target else page
        if not found.exists() or (anchor and anchor not in _anchors(found)):
            missing.append(f"{target}#{anchor}" if anchor else target)
    assert not missing
