"""The committed stubs are generated from the .proto files."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_stubs_are_fresh(tmp_path: Path) -> None:
    subprocess.run(["make", "proto-tools"], cwd=ROOT, check=True, capture_output=True)
    tools = ROOT / ".venv-proto" / "bin"
    command = [str(tools / "python"), str(ROOT / "scripts" / "generate_stubs.py"), str(tmp_path)]
    subprocess.run(command, check=True, env={"PATH": f"{tools}:/usr/bin:/bin"}, capture_output=True)
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2*.py*")}
    kept = {
        p.relative_to(ROOT / "proto"): p.read_text() for p in (ROOT / "proto").rglob("*_pb2*.py*") if p.suffix != ".pyc"
    }
    assert made == kept
    assert (ROOT / "proto" / "lattice" / "v1" / "py.typed").exists()
