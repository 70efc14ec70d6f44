"""Owns the reservation of Ray's resources for one node. Rule: one reservation holds all that a node offers."""

import asyncio
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lattice_server.config import ServerConfig
from lattice_server.engine.ports import Contact
from lattice_server.engine.stores.artifact_store import HEAD as HEAD_STORE
from lattice_server.executors.backoff import Backoff
from lattice_server.executors.bind_address import ANY, ray_interface
from lattice_server.executors.worker_command import Offer, offer_of_head

HEAD = "lattice-head"  # The resource that only the head's own Ray node has.
OWN = "the server"  # The subject of nodes that no machine offered.
TOKEN = "LATTICE_TOKEN"
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.2, 5.0


@dataclass(slots=True)
class Reservation:
    """A bundle of Ray's resources, and the worker that lives in it.

    `key` names it between the server and the driver. The worker shares the server's store if it has `store_directory`.
    `follows_node` is whether the worker reaches the server as the agent that started its Ray node does.
    """

    key: str
    node_id: str
    bundle: Mapping[str, float]
    offer: Offer
    target: str
    environment: Mapping[str, str] = field(default_factory=dict)
    store_directory: Path | None = None
    follows_node: bool = False
    worker_id: str = ""
    placed_at: float | None = None
    backoff: Backoff = field(default_factory=lambda: Backoff(MIN_BACKOFF_S, MAX_BACKOFF_S))
    restart: asyncio.TimerHandle | None = None

    @property
    def store_name(self) -> str:
        """The name of the store that its worker uses."""
        return self.node_id if self.store_directory is None else HEAD_STORE

    @property
    def is_placed(self) -> bool:
        """Whether Ray has started the worker."""
        return self.placed_at is not None

    def cancel_restart(self) -> None:
        """Cancel the timer that starts another worker."""
        if self.restart is not None:
            self.restart.cancel()
            self.restart = None

    def lose(self, now: float) -> float:
        """Note that the worker is gone; return in how many seconds to start another."""
        lived_s = 0.0 if self.placed_at is None else now - self.placed_at
        self.placed_at = None
        return self.backoff.after(lived_s)


def own_reservations(
    config: ServerConfig, contact: Contact, total: Mapping[str, float], store_directory: Path
) -> list[Reservation]:
    """Return the reservations that the server makes by itself.

    They are all of the head's own node, whose Ray counts `total`; in another's Ray, the workers that were configured.
    """
    offer = offer_of_head(config)
    if config.num_cpus == 0:
        return []
    if not config.ray_address:
        bundle = bundle_of(total.get("CPU", 1), int(total.get("GPU", 0)), HEAD)
        offer = replace(offer, num_cpus=bundle["CPU"], num_gpus=int(bundle.get("GPU", 0)))
        return [Reservation(HEAD, "ray-head", bundle, offer, contact.local_target, store_directory=store_directory)]
    bundle = bundle_of(config.num_cpus or 1, config.num_gpus or 0)
    names = [f"ray-{number}" for number in range(1, config.ray_workers + 1)]
    return [Reservation(name, name, bundle, offer, *way_from_afar(config, contact, name)) for name in names]


def way_from_afar(
    config: ServerConfig, contact: Contact, node_id: str, subject: str = OWN
) -> tuple[str, dict[str, str]]:
    """Return the address that the worker of a node dials from another machine, and its environment.

    The environment has a token for this worker, which says that the node is the subject's.
    """
    host, _, port = contact.target.rpartition(":")
    if host in ANY:
        host = ray_interface(config.node_ip or host)
    environment = {TOKEN: contact.issue(node_id, subject)}
    if config.tls is not None:
        return f"grpcs://{host}:{port}", environment
    # The server was started with `--insecure`; its workers would refuse to dial without the same consent.
    return f"{host}:{port}", {**environment, "LATTICE_INSECURE": "1"}


def bundle_of(cpus: float, gpus: int, resource: str | None = None) -> dict[str, float]:
    """Return the resources to reserve for a node."""
    bundle = {"CPU": float(whole_cpus(cpus)), "GPU": float(gpus)}
    if resource is not None:
        bundle[resource] = 1.0
    return {name: amount for name, amount in bundle.items() if amount}


def whole_cpus(cpus: float) -> int:
    """Return the number of CPUs as Ray counts them."""
    return max(1, math.floor(cpus)) if cpus else 0


def resource_of(node_id: str) -> str:
    """Return the name of the resource that only the Ray node of `node_id` has."""
    plain = re.sub(r"[^A-Za-z0-9.-]", "-", node_id)
    # Ray separates names by commas and other signs; names that differ in those alone must still differ.
    return f"lattice-node-{plain}" if plain == node_id else f"lattice-node-{plain}-{zlib.crc32(node_id.encode()):08x}"
