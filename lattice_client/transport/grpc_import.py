"""Imports gRPC without its fork handlers, unless the environment asks for them.

They start threads anew in a forked child, one of which crashes now and then, and print a line at most forks. No client
works in such a child anyway; see `forks`. gRPC reads the variable when it is imported, and no program that is started
from here is to inherit it.
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
