"""The wheel holds all that the packages need, and nothing that is not theirs."""

import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("lattice/v1", "lattice_client", "lattice_server", "lattice_worker")


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files in the wheel, built from a copy: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    wanted = ("proto/", "lattice_", "pyproject.toml", "README.md")
    for name in filter(None, tracked):
        if name.startswith(wanted) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    # The environment of the stubs has a setuptools of its own, new enough to build with.
    subprocess.run(["make", "proto-tools"], cwd=ROOT, check=True, capture_output=True)
    python = ROOT / ".venv-proto" / "bin" / "python"
    command = [python, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", folder]
    done = subprocess.run([*command, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_contract_is_in_it_whole(names: set[str]) -> None:
    folder = ROOT / "proto" / "lattice" / "v1"
    kinds = (".py", ".pyi", ".proto", "py.typed")
    expected = {f"lattice/v1/{path.name}" for path in folder.iterdir() if path.name.endswith(kinds)}
    assert {name for name in names if name.startswith("lattice/")} == expected


@pytest.mark.parametrize("package", ["lattice_client", "lattice_server", "lattice_worker"])
def test_every_module_of_a_package_is_in_it(names: set[str], package: str) -> None:
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
    assert expected | {f"{package}/py.typed"} <= names


def test_the_program_of_the_runner_is_in_it(names: set[str]) -> None:
    assert "lattice_worker/runner/__main__.py" in names


def test_nothing_else_is_in_it(names: set[str]) -> None:
    strangers = {name for name in names if not name.startswith(PACKAGES) and ".dist-info/" not in name}
    assert not strangers
