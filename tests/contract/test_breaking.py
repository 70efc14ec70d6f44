"""The contract is held to its baseline: additions pass, breaks do not, and a decision page names the baseline."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BASELINE = ROOT / "proto" / "lattice_v1.binpb"
BUF = ROOT / ".venv" / "bin" / "buf"


def breaking(folder: Path) -> subprocess.CompletedProcess[str]:
    """Compare the contract in a folder with the baseline."""
    return subprocess.run(
        [BUF, "breaking", "--against", BASELINE], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the contract."""
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    shutil.copytree(ROOT / "proto", tmp_path / "proto", ignore=shutil.ignore_patterns("*.py", "*.pyi"))
    return tmp_path


def change(folder: Path, name: str, old: str, new: str) -> None:
    """Replace the first occurrence of a text in a file of the contract."""
    path = folder / "proto" / "lattice" / "v1" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_contract_breaks_nothing_of_its_baseline() -> None:
    found = breaking(ROOT)
    assert found.returncode == 0, found.stdout + found.stderr


def test_addition_passes_when_it_takes_a_reserved_number(copied: Path) -> None:
    change(copied, "cluster.proto", "  reserved 18 to 24;\n", "  string zone = 18;\n  reserved 19 to 24;\n")
    found = breaking(copied)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize(
    ("name", "old", "new", "complaint"),
    [
        ("run.proto", "  string tenant = 12;\n", "", 'field "12"'),
        ("run.proto", "string tenant = 12;", "bytes tenant = 12;", "tenant"),
        ("task.proto", "optional int32 max_parallel", "int32 max_parallel", "max_parallel"),
        (
            "artifact.proto",
            "  rpc WriteArtifact(stream WriteArtifactRequest) returns (WriteArtifactResponse);\n",
            "",
            "RPC",
        ),
        ("errors.proto", "ERROR_REASON_QUEUE_FULL = 17", "ERROR_REASON_QUEUE_IS_FULL = 17", "QUEUE_FULL"),
    ],
)
def test_change_is_refused_when_it_breaks_callers(copied: Path, name: str, old: str, new: str, complaint: str) -> None:
    change(copied, name, old, new)
    found = breaking(copied)
    assert found.returncode != 0
    assert complaint in found.stdout + found.stderr


def test_baseline_is_named_by_a_decision_page() -> None:
    digest = f"sha256:{hashlib.sha256(BASELINE.read_bytes()).hexdigest()}"
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "decisions").glob("*.md"))
    assert digest in pages, f"a change of the baseline needs a decision page with the line: Baseline: `{digest}`"
