"""`python -m lattice_worker`."""

import os

# This process starts others. With its fork handlers on, grpc starts threads between fork and exec of each of them,
# which now and then crash it there. Read when grpc is imported, so set before.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

from lattice_worker.cli import main  # after the line above

main()
