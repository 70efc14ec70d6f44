"""Owns the checking of what workers and machines say of themselves.

Rule: what the ledger would count with, and what people would read, is sound before anybody sees it.
"""

from lattice.v1 import cluster_pb2, resources_pb2, worker_pb2

from lattice_server import __version__
from lattice_server.core.errors import invalid_field
from lattice_server.engine.store import HEAD
from lattice_server.rpc import convert
from lattice_server.rpc.limits import PROTOCOL_VERSION

MAX_NAME = 128
MAX_CPUS = 1e6
MAX_DEADLINE_S = 30 * 24 * 3600.0


def check_first(first: worker_pb2.ConnectRequest, *, is_beside: bool) -> None:
    """Check how a stream begins; `is_beside` tells that it came by the server's own socket. Raises InvalidError."""
    kind = first.WhichOneof("opening")
    if kind is None:
        raise invalid_field("opening", "the first message must have `hello` of a worker or `join` of a machine")
    offer: worker_pb2.Hello | worker_pb2.Join = getattr(first, kind)
    _check_name(offer.node_id, f"{kind}.node_id")
    if offer.node_id == HEAD and not is_beside:
        raise invalid_field(f"{kind}.node_id", f"{HEAD!r} is the server's own, in whose name large values lie there")
    if isinstance(offer, worker_pb2.Hello):
        _check_name(offer.worker_id, f"{kind}.worker_id")
    _check_capacity(offer.capacity, f"{kind}.capacity")


def version_misfit(first: worker_pb2.ConnectRequest) -> worker_pb2.Close | None:
    """Return the answer to a worker or a machine that speaks another version of the protocol; None to others."""
    kind = first.WhichOneof("opening")
    offer = first.hello if kind == "hello" else first.join
    if kind is None or offer.protocol_version == PROTOCOL_VERSION:
        return None
    theirs = f"version {offer.version or 'unknown'} and speaks protocol {offer.protocol_version}"
    ours = f"version {__version__} and speaks protocol {PROTOCOL_VERSION}"
    text = f"the worker on node {offer.node_id!r} has {theirs}; the server has {ours}"
    return worker_pb2.Close(reason=worker_pb2.CLOSE_REASON_VERSION, message=text)


def deadline_from_proto(message: worker_pb2.Draining | cluster_pb2.DrainNodeRequest) -> float | None:
    """Return how long what runs may still run, in seconds, at most a month; None when it may finish.

    Raises InvalidError.
    """
    if not message.HasField("deadline"):
        return None
    seconds = convert.seconds_from(message.deadline)
    if seconds < 0:
        raise invalid_field("deadline", "must not be negative")
    return min(seconds, MAX_DEADLINE_S)


def _check_name(name: str, field: str) -> None:
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise invalid_field(field, f"must have 1 to {MAX_NAME} characters, all of them printable")


def _check_capacity(capacity: resources_pb2.Capacity, field: str) -> None:
    # Not a number compares false, so it is caught as well.
    if not 0 <= capacity.cpu < MAX_CPUS:
        raise invalid_field(f"{field}.cpu", "must be a number from 0")
    for name in ("memory_bytes", "slots", "async_slots"):
        if getattr(capacity, name) < 0:
            raise invalid_field(f"{field}.{name}", "must not be negative")
    known = set()
    for number, gpu in enumerate(capacity.gpus):
        if gpu.index < 0 or gpu.index in known:
            raise invalid_field(f"{field}.gpus[{number}].index", "must be from 0, and no other device's")
        if gpu.memory_bytes < 0:
            raise invalid_field(f"{field}.gpus[{number}].memory_bytes", "must not be negative")
        known.add(gpu.index)
