"""Mistakes in workflows: type checkers find most of those in calls that are typed, building a workflow finds all."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lattice_client import LatticeClient, TaskDefinitionError
from tests.client.typed import correct, planted

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = ROOT / "tests" / "tools"
FOLDER = Path(planted.__file__).parent
Check = Callable[[Path], dict[int, str]]
# LangGraph and its dependencies have five times as many types as all else, and these programs use none of them.
LESS = "[mypy]\n[mypy-langgraph.*,langchain_core.*]\nfollow_imports = skip\n"


def _mypy_with_langgraph(file: Path) -> dict[int, str]:
    return _mypy(file, "")


def _mypy(file: Path, config: str = LESS) -> dict[int, str]:
    (file.parent / "mypy.ini").write_text(config)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=mypy.ini", "--no-error-summary", file.name]
    done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    lines = re.findall(r"^([^:\n]+):(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    assert {name for name, _, _ in lines} <= {file.name}, done.stdout
    return {int(line): text for _, line, text in lines}


def _pyright(file: Path) -> dict[int, str]:
    if shutil.which("npm") is None:
        pytest.skip("needs Node.js")
    subprocess.run(["make", "nodejs"], cwd=ROOT, check=True, capture_output=True, timeout=300)
    command = [TOOLS / "node_modules" / ".bin" / "pyright", "--outputjson", "--pythonpath", sys.executable, file.name]
    done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    found = json.loads(done.stdout)["generalDiagnostics"]
    return {one["range"]["start"]["line"] + 1: one["message"] for one in found if one["severity"] != "information"}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(_mypy, id="mypy"),
        pytest.param(_mypy_with_langgraph, id="mypy with LangGraph", marks=pytest.mark.exhaustive),
        pytest.param(_pyright, id="pyright", marks=pytest.mark.exhaustive),
    ],
)
def check(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Check:
    """A type checker, run as in another project with Lattice installed; it returns its findings in a file by line."""

    # One folder for all files: a checker with a cache of its findings in Lattice is faster with the next file.
    folder = tmp_path_factory.mktemp("elsewhere")

    def checked(file: Path) -> dict[int, str]:
        copied = folder / file.name
        shutil.copy(file, copied)
        found: dict[int, str] = request.param(copied)
        return found

    return checked


@pytest.mark.slow
def test_a_type_checker_finds_mistakes_in_typed_calls(check: Check) -> None:
    lines = (FOLDER / "planted.py").read_text().splitlines()
    marked = {number for number, line in enumerate(lines, 1) if line.endswith("# found by both")}
    assert len(marked) == 10
    assert set(check(FOLDER / "planted.py")) == marked


@pytest.mark.slow
def test_type_checker_accepts_correct_programs(check: Check) -> None:
    assert check(FOLDER / "correct.py") == {}


@pytest.mark.parametrize("mistake", planted.MISTAKES, ids=lambda found: found.__name__)
def test_building_a_workflow_finds_each_mistake(mistake: Callable[[Any], Any], client: LatticeClient) -> None:
    with pytest.raises(TaskDefinitionError):
        mistake(client.create_workflow())


def test_correct_workflows_can_be_built(client: LatticeClient) -> None:
    workflow = correct.build(client)
    assert workflow.tasks["all"].inputs["mode"] == "fast"
    assert workflow.tasks["split"].definition is correct.split
    assert correct.direct() == ({"head": "a", "tail": ["b"]}, 3)
