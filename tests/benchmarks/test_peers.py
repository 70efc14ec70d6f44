"""The comparison with other systems: its page, its environments, and the sides that need no installation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers import __main__ as peers
from benchmarks.peers import environments
from benchmarks.peers.environments import InstallError, environment, python_of
from benchmarks.peers.report import Comparison, read, text_of, write
from benchmarks.peers.systems import ALL, SYSTEMS, System

ROOT = Path(__file__).parent.parent.parent


def compared() -> Comparison:
    found = Comparison(["a machine"])
    for values in ([0.002], [0.004, 0.006]):
        found.add("lattice", {"W1": values, "W3": [2.0]}, {"grpcio": "1.0"})
    found.add("dask", {"W1": [0.008], "W2": [0.001], "W3": [246.8]}, {"dask": "2.0", "Python": "3.11"})
    return found


def test_page_on_other_systems_shows_the_recorded_measurements() -> None:
    page = ROOT / "docs" / "peers.md"
    assert page.read_text() == text_of(read(page)), "`make bench-peers` writes the page"
    assert {*read(page).samples} == {*SYSTEMS}


def test_page_shows_medians_over_all_rounds_and_ratios_to_lattice() -> None:
    lines = text_of(compared()).splitlines()
    assert "| Lattice | 4 |  | 2,000 | 2 |" in lines
    assert "| Dask | 8 (2) | 1 | 246,800 (123) | 1 |" in lines
    assert any(line.startswith("- **Dask** (dask 2.0, Python 3.11): ") for line in lines)
    assert all(len(line) <= 120 for line in lines)
    assert not any("other programs" in line for line in lines)


def test_page_says_how_much_of_the_processors_other_programs_used() -> None:
    found = compared()
    found.busy = [0.02, 0.9, 0.04]
    assert "- other programs used 4 % of the processors meanwhile" in text_of(found).splitlines()


def test_comparison_is_read_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "page.md", compared())
    assert read(tmp_path / "page.md") == compared()


def test_each_system_has_a_side_and_knows_how_often_it_is_measured() -> None:
    sides = {path.stem.removesuffix("_side") for path in peers.SIDES.glob("*_side.py")}
    assert sides == {*SYSTEMS}
    for system in SYSTEMS.values():
        assert {*system.repeats} == {*ALL} >= {*system.warm}


def test_environment_is_made_once_and_again_when_its_packages_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        commands.append(command[command.index("install") :])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(environments.venv, "create", lambda place, with_pip: place.mkdir(parents=True))
    monkeypatch.setattr(environments.subprocess, "run", run)
    for packages in (("a==1",), ("a==1",), ("a==2",)):
        python = python_of("a", System("A", packages, ""), tmp_path)
        assert python == tmp_path / "a" / "bin" / "python"
    assert [command[-1] for command in commands] == ["a==1", "a==2"]
    assert python_of("b", System("B", (), ""), tmp_path) == Path(sys.executable)


def test_failed_installation_names_the_command_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "warning\nno such package")
    monkeypatch.setattr(environments.venv, "create", lambda place, with_pip: place.mkdir(parents=True))
    monkeypatch.setattr(environments.subprocess, "run", lambda *_, **__: failed)
    for _ in range(2):
        with pytest.raises(InstallError, match=r"(?s)A: .*install .* a==1.*no such package"):
            python_of("a", System("A", ("a==1",), ""), tmp_path)


def test_sides_get_no_settings_of_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "PREFECT_API_URL", "LATTICE_TARGET", "PYTHONDONTWRITEBYTECODE"):
        monkeypatch.setenv(name, "x")
    found = environment()
    assert "x" not in found.values()
    assert found["PYTHONPATH"] == str(ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lattice", "pool", "langgraph"])
def test_side_has_right_results_in_this_environment(name: str) -> None:
    line = json.loads(peers._run(name, Path(sys.executable), ALL))
    assert {workload: len(values) for workload, values in line["samples"].items()} == SYSTEMS[name].repeats
    assert all(seconds > 0 for values in line["samples"].values() for seconds in values)
    assert line["versions"]["Python"]


def test_side_that_fails_ends_the_comparison_with_its_last_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SYSTEMS, "pool", System("Pool", (), "", {"W9": 1}, ("W9",)))
    with pytest.raises(peers.SideError, match=r"(?s)Pool failed with status 1:.*KeyError: 'W9'"):
        peers._run("pool", Path(sys.executable), ["W9"])
