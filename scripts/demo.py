"""Starts a server on Ray, runs the agent example on it, and stops the server. `make demo` calls it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LATTICE = str(Path(sys.executable).parent / "lattice")


def main() -> int:
    """Return the example's exit status."""
    server = subprocess.Popen([LATTICE, "start", "--head", "--port", "0"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        line = server.stdout.readline().strip()
        print(line)
        environment = {**os.environ, "LATTICE_TARGET": line.rpartition(" ")[2]}
        example = [sys.executable, str(ROOT / "examples" / "agent" / "main.py")]
        return subprocess.run(example, env=environment, check=False).returncode
    finally:
        server.terminate()
        server.wait(30)
        print("The server has stopped.")


if __name__ == "__main__":
    sys.exit(main())
