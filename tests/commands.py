"""The commands that tests run in processes of their own."""

import sys
from pathlib import Path

LATTICE = str(Path(sys.executable).parent / "lattice")
# What `lattice start` turns into. The command itself first imports all of its subcommands, for half a second.
START = [sys.executable, "-m", "lattice_server", "start"]
