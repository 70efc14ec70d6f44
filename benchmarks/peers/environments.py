"""Makes the virtual environments of the compared systems.

Rule: each system has its own, which is made again when the packages of the system change.
"""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.peers.systems import System

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / ".venv-peers"
INSTALL_S = 900
LAST_LINES = 5


class InstallError(Exception):
    """The packages of a system could not be installed."""


def python_of(name: str, system: System, folder: Path = FOLDER) -> Path:
    """Return the interpreter that has a system, after installing the system if need be. Raises InstallError."""
    if not system.packages:
        return Path(sys.executable)
    place = folder / name
    python, stamp, wanted = place / "bin" / "python", place / ".stamp", "\n".join([sys.version, *system.packages])
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True)
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *system.packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_S)
    if done.returncode != 0:
        lines = "\n".join(done.stderr.splitlines()[-LAST_LINES:])
        raise InstallError(f"{system.title}: `{' '.join(command)}` failed; it needs a package index:\n{lines}")
    stamp.write_text(wanted)
    return python


def environment() -> dict[str, str]:
    """Return the environment of the sides, in which benchmarks can be imported and other settings do not count."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LATTICE_", "RAY_", "PREFECT_"))}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)  # Each process would compile a system anew.
    return {**kept, "PYTHONPATH": str(ROOT)}
