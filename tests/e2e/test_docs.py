"""The README and the pages with examples, run as a reader runs them: the server, each script, each call."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lattice.v1.resources_pb2 import Isolation

from lattice_client import LatticeClient
from tests.e2e.conftest import served
from tests.e2e.test_other_languages import curl

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Block:
    """A block of a page: its language, its text, its section, and the text or JSON that the page shows after it."""

    language: str
    text: str
    section: str
    shown: str


def _blocks(name: str) -> list[Block]:
    found: list[Block] = []
    page = (ROOT / name).read_text()
    pieces = list(re.finditer(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        section = re.findall(r"^#+ (.*)$", page[: piece.start()], re.MULTILINE)[-1]
        # A sentence may stand between, but no heading.
        is_shown = (
            following is not None
            and following[1] in {"text", "json"}
            and "\n#" not in page[piece.end() : following.start()]
        )
        shown = following[2] if following and is_shown else ""
        found.append(Block(piece[1], piece[2], section, shown))
    return found


NAMES = (
    *("scheduling", "client", "langgraph", "streams", "calls", "signals", "durability", "services"),
    *("tasks", "code", "isolation", "telemetry"),
)
PAGES = ("README.md", *(f"docs/{name}.md" for name in NAMES))
BLOCKS = [block for page in PAGES for block in _blocks(page)]
# The lines of parallel calls in these scripts come in any order.
UNORDERED = {"First script", "Batches"}
SCRIPTS = [block for block in BLOCKS if block.language == "python"]
CALL = re.compile(r"-d '(.*?)' (?:\\\n)?\s*127\.0\.0\.1:50051 lattice\.v1\.(\S+)", re.DOTALL)
CALLS = [block for block in BLOCKS if block.text.startswith("grpcurl")]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the server that docs/scheduling.md starts."""
    page = _blocks("docs/scheduling.md")
    (start,) = [block.text for block in page if block.text.startswith("lattice start")]
    (config,) = [block.text for block in page if block.language == "toml"]
    path = tmp_path_factory.mktemp("docs") / "lattice.toml"
    path.write_text(config)
    flags = shlex.split(start)[3:]
    assert flags[flags.index("--config") + 1] == path.name
    flags[flags.index("--config") + 1] = str(path)
    with served(*flags) as found:
        yield found


@pytest.mark.parametrize("block", SCRIPTS, ids=[f"{block.section}-{n}" for n, block in enumerate(SCRIPTS)])
def test_a_script_prints_the_text_that_the_page_shows(address: str, block: Block, tmp_path: Path) -> None:
    if block.shown and 'isolation="seccomp"' in block.text:
        with LatticeClient(address) as client:
            if Isolation.ISOLATION_SECCOMP not in client.nodes()[0].isolations:
                pytest.skip("this machine does not offer the isolation that the script asks for")
    (tmp_path / "script.py").write_text(block.text)
    environment = {**os.environ, "LATTICE_TARGET": address, "PROVIDER_KEY": "sk-0123456789"}
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    printed, shown = [line.rstrip() for line in done.stdout.splitlines()], block.shown.splitlines()
    if block.section in UNORDERED:
        printed, shown = sorted(printed), sorted(shown)
    assert printed == shown


def test_the_calls_return_the_fields_that_the_page_shows(address: str) -> None:
    for block in CALLS:
        answers: list[Any] = []
        for request, method in CALL.findall(block.text):
            answers = curl(address, method, json.loads(request))
        assert any(_has(answer, json.loads(block.shown)) for answer in answers), answers


def _has(found: Any, shown: Any) -> bool:
    """Whether all that is shown is found: keys of objects may be left out, items of lists too."""
    if isinstance(shown, dict):
        return isinstance(found, dict) and all(key in found and _has(found[key], shown[key]) for key in shown)
    if isinstance(shown, list):
        return isinstance(found, list) and all(any(_has(item, wanted) for item in found) for wanted in shown)
    return bool(found == shown)


def test_every_script_and_call_of_the_pages_has_its_output() -> None:
    assert len(SCRIPTS) >= 10
    assert all(block.shown for block in CALLS)
    assert all(block.shown for block in SCRIPTS if "print(" in block.text)
