"""Owns the import of gRPC with settings that the environment has not made.

Its fork handlers restart threads in a forked child, one of which sometimes crashes, and print a line at most forks. No
client works in such a child in any case; see `forks`. By default gRPC prints a line for each failed TLS handshake; the
errors of the client say the same. gRPC reads the variables when it is imported. They are removed afterwards, so that no
child program inherits them.
"""

import os

SETTINGS = {"GRPC_ENABLE_FORK_SUPPORT": "0", "GRPC_VERBOSITY": "ERROR"}

_made = {name: value for name, value in SETTINGS.items() if name not in os.environ}
os.environ.update(_made)
try:
    import grpc
finally:
    for _name in _made:
        del os.environ[_name]

__all__ = ["grpc"]
