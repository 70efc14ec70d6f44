"""The examples, as a reader runs them."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"


def test_the_agent_answers(address: str) -> None:
    command = [sys.executable, str(EXAMPLES / "agent" / "main.py")]
    environment = {**os.environ, "LATTICE_TARGET": address}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert "0001-worker-processes.md; sales were 215; the number is 84." in done.stdout, done.stderr
