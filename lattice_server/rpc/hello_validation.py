"""Owns how the stream of a worker or a machine begins, and how long what runs may still run when it is to leave.

Rule: whoever does not fit is told why, and nobody else hears of it.
"""

from lattice.v1 import cluster_pb2, worker_pb2

from lattice_server import __version__
from lattice_server.core.errors import invalid_field
from lattice_server.engine.artifact_store import HEAD
from lattice_server.rpc.claims import check_offer
from lattice_server.rpc.convert import payloads
from lattice_server.rpc.limits import PROTOCOL_VERSION

MAX_DEADLINE_S = 30 * 24 * 3600.0


def check_first(first: worker_pb2.ConnectRequest, *, is_beside: bool) -> None:
    """Check how a stream begins; `is_beside` tells that it came by the server's own socket. Raises InvalidError."""
    kind = first.WhichOneof("opening")
    if kind is None:
        raise invalid_field("opening", "the first message must have `hello` of a worker or `join` of a machine")
    offer: worker_pb2.Hello | worker_pb2.Join = getattr(first, kind)
    check_offer(offer, kind)
    if offer.node_id == HEAD and not is_beside:
        raise invalid_field(f"{kind}.node_id", f"{HEAD!r} is the server's own, in whose name large values lie there")


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
    seconds = payloads.seconds_from(message.deadline)
    if seconds < 0:
        raise invalid_field("deadline", "must not be negative")
    return min(seconds, MAX_DEADLINE_S)
