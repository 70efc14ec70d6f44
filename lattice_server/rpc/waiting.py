"""Owns how long a call may wait for something to end. Rule: nobody waits for ever on one call."""

from google.protobuf.duration_pb2 import Duration

from lattice_server.core.errors import invalid_field
from lattice_server.rpc.convert.payloads import seconds_from

MAX_WAIT_S = 300.0


def wait_from_proto(message: Duration, field: str) -> float:
    """Return how many seconds a caller waits, five minutes at most. Raises InvalidError."""
    seconds = seconds_from(message)
    if seconds < 0:
        raise invalid_field(field, "must not be negative")
    return min(seconds, MAX_WAIT_S)
