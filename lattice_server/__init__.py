"""The Lattice server: keeps workflows and runs, schedules attempts onto workers, streams what happens."""

import os
import sys

# This process starts others. With its fork handlers on, grpc starts threads between fork and exec of each of them,
# which now and then crash it there. Read when grpc is imported, so set before; a process that has imported it already
# must not serve.
MAY_SERVE = "grpc" not in sys.modules or os.environ.get("GRPC_ENABLE_FORK_SUPPORT") == "0"
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
# Left to itself gRPC writes a line for each caller with whom no TLS comes about: whoever finds the port fills the disk.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

__version__ = "0.1.0"
