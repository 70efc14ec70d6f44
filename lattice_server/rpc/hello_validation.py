"""Checks the first message of workers and machines, and their heartbeats.

Rule: names, capacities and labels are bounded and printable before the server stores or shows them.
"""

from collections.abc import Iterable, Mapping

from lattice.v1 import resources_pb2, worker_pb2

from lattice_server import __version__
from lattice_server.core.errors import invalid_field
from lattice_server.engine.ports import OWN_NODE
from lattice_server.engine.stores.artifact_store import HEAD
from lattice_server.rpc.convert.cluster import PROTOCOL_VERSION

# A worker that takes the id of another one replaces it, and ends its attempts.
RESERVED = {HEAD: "the server's own store of artifacts", OWN_NODE: "the node of the server's own worker"}
MAX_NAME = 128
MAX_TEXT = 256
MAX_CPUS = 1e6
MAX_BYTES = 1 << 60
MAX_SLOTS = 1 << 23
MAX_GPUS = 1024
MAX_LABELS = 256
MAX_ENTRYPOINTS = 10_000
MAX_LEASES = 1_000_000
MAX_ARTIFACTS = 1_000_000


def check_first(first: worker_pb2.ConnectRequest, *, is_local: bool) -> None:
    """Check the first message of a stream; `is_local` tells that it came by the server's own socket.

    Raises InvalidError.
    """
    kind = first.WhichOneof("opening")
    if kind is None:
        raise invalid_field("opening", "the first message must have `hello` of a worker or `join` of a machine")
    offer: worker_pb2.Hello | worker_pb2.Join = getattr(first, kind)
    _check_offer(offer, kind)
    if offer.node_id in RESERVED and not is_local:
        text = f"{offer.node_id!r} names {RESERVED[offer.node_id]}; choose another --node-id"
        raise invalid_field(f"{kind}.node_id", text)


def version_refusal(first: worker_pb2.ConnectRequest) -> worker_pb2.Close | None:
    """Return the refusal of a worker or a machine with another version of the protocol; None when it fits."""
    kind = first.WhichOneof("opening")
    offer = first.hello if kind == "hello" else first.join
    if kind is None or offer.protocol_version == PROTOCOL_VERSION:
        return None
    theirs = f"version {offer.version or 'unknown'} and speaks protocol {offer.protocol_version}"
    ours = f"version {__version__} and speaks protocol {PROTOCOL_VERSION}"
    text = f"the worker on node {offer.node_id!r} has {theirs}; the server has {ours}"
    return worker_pb2.Close(reason=worker_pb2.CLOSE_REASON_VERSION, message=text)


def _check_name(name: str, field: str) -> None:
    """Raise InvalidError unless a name is short and printable."""
    if not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise invalid_field(field, f"must have 1 to {MAX_NAME} characters, all of them printable")


def _check_offer(offer: worker_pb2.Hello | worker_pb2.Join, field: str) -> None:
    """Check the names, capacity and labels of a worker or a machine. Raises InvalidError."""
    _check_name(offer.node_id, f"{field}.node_id")
    for name in ("hostname", "node_ip", "version"):
        _check_text(getattr(offer, name), f"{field}.{name}")
    _check_capacity(offer.capacity, f"{field}.capacity")
    _check_labels(offer.labels, f"{field}.labels")
    if isinstance(offer, worker_pb2.Join):
        return
    _check_name(offer.worker_id, f"{field}.worker_id")
    _check_text(offer.session_id, f"{field}.session_id")
    _check_text(offer.runtime.language, f"{field}.runtime.language")
    _check_text(offer.runtime.version, f"{field}.runtime.version")
    _check_texts(offer.entrypoints, f"{field}.entrypoints", MAX_ENTRYPOINTS)
    _check_texts(offer.held_lease_ids, f"{field}.held_lease_ids", MAX_LEASES)
    _check_texts((held.lease_id for held in offer.held_leases), f"{field}.held_leases", MAX_LEASES)
    for held in offer.held_leases:
        _check_texts((wait.task_id for wait in held.waits), f"{field}.held_leases.waits", MAX_LEASES)
    _check_texts(offer.stored_artifact_ids, f"{field}.stored_artifact_ids", MAX_ARTIFACTS)
    _check_texts(offer.reported_artifact_ids, f"{field}.reported_artifact_ids", MAX_ARTIFACTS)


def check_heartbeat(heartbeat: worker_pb2.Heartbeat) -> None:
    """Check the lease ids of a heartbeat. Raises InvalidError."""
    _check_texts(heartbeat.held_lease_ids, "heartbeat.held_lease_ids", MAX_LEASES)


def _check_capacity(capacity: resources_pb2.Capacity, field: str) -> None:
    # NaN compares false, so it is refused as well.
    if not 0 <= capacity.cpu < MAX_CPUS:
        raise invalid_field(f"{field}.cpu", f"must be a number from 0, below {MAX_CPUS:.0f}")
    for name, most in (("memory_bytes", MAX_BYTES), ("slots", MAX_SLOTS), ("async_slots", MAX_SLOTS)):
        _check_number(getattr(capacity, name), f"{field}.{name}", most)
    if len(capacity.gpus) > MAX_GPUS:
        raise invalid_field(f"{field}.gpus", f"must have at most {MAX_GPUS} devices")
    known = set()
    for number, gpu in enumerate(capacity.gpus):
        where = f"{field}.gpus[{number}]"
        if gpu.index < 0 or gpu.index in known:
            raise invalid_field(f"{where}.index", "must be from 0 and used once")
        _check_number(gpu.memory_bytes, f"{where}.memory_bytes", MAX_BYTES)
        _check_text(gpu.model, f"{where}.model")
        _check_text(gpu.uuid, f"{where}.uuid")
        known.add(gpu.index)


def _check_labels(labels: Mapping[str, str], field: str) -> None:
    if len(labels) > MAX_LABELS:
        raise invalid_field(field, f"must have at most {MAX_LABELS} entries")
    for name, value in labels.items():
        _check_text(name, field)
        _check_text(value, field)


def _check_number(number: int, field: str, most: int) -> None:
    if not 0 <= number <= most:
        raise invalid_field(field, f"must not be negative, nor over {most}")


def _check_text(text: str, field: str) -> None:
    if len(text) > MAX_TEXT or not text.isprintable():
        raise invalid_field(field, f"must have at most {MAX_TEXT} characters, all of them printable")


def _check_texts(texts: Iterable[str], field: str, most: int) -> None:
    for number, text in enumerate(texts):
        if number == most:
            raise invalid_field(field, f"must have at most {most} entries")
        # Only lengths are checked: the list may be long, and its ids are compared and never shown.
        if len(text) > MAX_TEXT:
            raise invalid_field(f"{field}[{number}]", f"must have at most {MAX_TEXT} characters")
