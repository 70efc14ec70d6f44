"""The wheel holds all that the packages need, and nothing that is not theirs."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("lattice/v1", "lattice_client", "lattice_server", "lattice_worker")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that a wheel is built from."""
    folder = tmp_path_factory.mktemp("source")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    wanted = ("proto/", "lattice_", "pyproject.toml", "README.md")
    for name in filter(None, tracked):
        if name.startswith(wanted) and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def _built(source: Path, target: str, folder: Path) -> zipfile.ZipFile:
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", folder]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.fixture(scope="module")
def names(source: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files in the wheel."""
    with _built(source, "wheel", tmp_path_factory.mktemp("wheel")) as wheel:
        return set(wheel.namelist())


def test_wheel_has_the_whole_contract(names: set[str]) -> None:
    folder = ROOT / "proto" / "lattice" / "v1"
    kinds = (".py", ".pyi", ".proto", "py.typed")
    expected = {f"lattice/v1/{path.name}" for path in folder.iterdir() if path.name.endswith(kinds)}
    assert {name for name in names if name.startswith("lattice/")} == expected


@pytest.mark.parametrize("package", ["lattice_client", "lattice_server", "lattice_worker"])
def test_wheel_has_every_module_of_the_packages(names: set[str], package: str) -> None:
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
    assert expected | {f"{package}/py.typed"} <= names


def test_wheel_has_the_program_of_the_runner(names: set[str]) -> None:
    assert "lattice_worker/runner/__main__.py" in names


def test_wheel_has_nothing_else(names: set[str]) -> None:
    strangers = {name for name in names if not name.startswith(PACKAGES) and ".dist-info/" not in name}
    assert not strangers


def test_editable_install_adds_two_folders_to_the_path(source: Path, tmp_path: Path) -> None:
    with _built(source, "wheel:editable", tmp_path) as wheel:
        (path,) = (name for name in wheel.namelist() if ".dist-info/" not in name)
        assert path.endswith(".pth")
        assert wheel.read(path).decode().split() == [str(source), str(source / "proto")]
