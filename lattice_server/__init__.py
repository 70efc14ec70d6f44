"""The Lattice server: keeps workflows and runs, schedules attempts onto workers, streams what happens."""

import sys

# A server starts other processes. With its fork handlers on, grpc starts threads between fork and exec of each of them,
# which now and then crash it there. It reads that when it is imported: a process that has imported it already must not
# serve. See `cli`.
MAY_SERVE = "grpc" not in sys.modules

__version__ = "0.1.0"
