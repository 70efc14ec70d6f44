"""Starts a server on Ray, runs the agent example on it, and stops the server. `make demo` calls it.

Flags are given to `lattice start`; by default the server has a free port.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "agent" / "main.py"
LATTICE = str(Path(sys.executable).parent / "lattice")


def main() -> int:
    """Return the example's exit status."""
    print("Starting a server that places its workers with Ray ...", flush=True)
    began = time.monotonic()
    environment = {"GRPC_VERBOSITY": "ERROR", "PYTHONUNBUFFERED": "1", **os.environ}
    command = [LATTICE, "start", "--head", *(sys.argv[1:] or ["--port", "0"])]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        line = server.stdout.readline().strip()
        if not line:
            return server.wait() or 1
        print(f"{line} after {time.monotonic() - began:.1f} s.\n\n$ lattice run examples/agent/main.py\n", flush=True)
        command = [LATTICE, "run", "--addr", line.rpartition(" ")[2], str(EXAMPLE)]
        return subprocess.run(command, env=environment, check=False).returncode
    finally:
        server.terminate()
        server.wait(30)
        print("\nThe server and its workers have stopped.")


if __name__ == "__main__":
    sys.exit(main())
