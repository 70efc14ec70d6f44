"""The worker: one process per node that takes attempts over a stream and runs them apart from itself."""

import os

# This process starts others. With its fork handlers on, grpc starts threads between fork and exec of each of them,
# which now and then crash it there. Read when grpc is imported, so set before.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
