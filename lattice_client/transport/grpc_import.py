"""Owns the import of gRPC without its fork handlers, unless the environment asks for them.

The handlers restart threads in a forked child, one of which sometimes crashes, and print a line at most forks. No
client works in such a child in any case; see `forks`. gRPC reads the variable when it is imported. It is removed
afterwards, so that no child program inherits it.
"""

import os

VARIABLE = "GRPC_ENABLE_FORK_SUPPORT"

if VARIABLE in os.environ:
    import grpc
else:
    os.environ[VARIABLE] = "0"
    import grpc

    del os.environ[VARIABLE]

__all__ = ["grpc"]
