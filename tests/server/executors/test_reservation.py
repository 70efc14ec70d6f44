"""The reservations of Ray's resources, the flags of workers, and the delay after a loss."""

import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lattice_server.config import ServerConfig, ServerTls
from lattice_server.core.model import Capacity, Gpu
from lattice_server.engine.ports import Contact
from lattice_server.engine.stores.artifact_store import HEAD as HEAD_STORE
from lattice_server.executors import bind_address
from lattice_server.executors.bind_address import ray_interface
from lattice_server.executors.ray_reservation import (
    HEAD,
    MAX_BACKOFF_S,
    MIN_BACKOFF_S,
    Reservation,
    bundle_of,
    own_reservations,
    resource_of,
    way_from_afar,
)
from lattice_server.executors.worker_command import Offer, offer_of_machine, worker_flags

CONTACT = Contact(
    "unix:/head.sock", "10.0.0.1:50051", lambda node_id, subject: "secret", lambda token: None, lambda error: None
)


def own(**settings: object) -> list[Reservation]:
    config = ServerConfig(**settings)  # type: ignore[arg-type]
    return own_reservations(config, CONTACT, {"CPU": 8.0, "GPU": 2.0}, Path("/store"))


def test_of_its_own_node_the_head_reserves_everything() -> None:
    (reservation,) = own()
    assert reservation.bundle == {"CPU": 8.0, "GPU": 2.0, HEAD: 1.0}
    assert (reservation.offer.num_cpus, reservation.offer.num_gpus) == (8.0, 2)
    assert (reservation.target, reservation.environment, reservation.follows_node) == (CONTACT.local_target, {}, False)
    assert (reservation.store_directory, reservation.store_name) == (Path("/store"), HEAD_STORE)


def test_a_head_without_cpus_reserves_nothing() -> None:
    assert own(num_cpus=0) == []


def test_only_configured_workers_are_reserved_when_ray_is_not_the_servers_own() -> None:
    found = own(ray_address="10.0.0.9:6379", ray_workers=3, num_cpus=2, num_gpus=1)
    assert [reservation.bundle for reservation in found] == [{"CPU": 2.0, "GPU": 1.0}] * 3
    assert len({reservation.node_id for reservation in found}) == 3
    assert [reservation.store_name for reservation in found] == [reservation.node_id for reservation in found]
    assert {(r.target, r.environment["LATTICE_TOKEN"], r.store_directory) for r in found} == {
        (CONTACT.target, "secret", None)
    }


def test_a_worker_on_another_machine_dials_an_address_it_can_reach() -> None:
    everywhere = Contact("unix:/head.sock", "0.0.0.0:50051", CONTACT.issue, CONTACT.revoke, CONTACT.on_failure)
    plain = ServerConfig(host="0.0.0.0", node_ip="10.0.0.7")
    assert way_from_afar(plain, everywhere, "far") == (
        "10.0.0.7:50051",
        {"LATTICE_TOKEN": "secret", "LATTICE_INSECURE": "1"},
    )
    safe = ServerConfig(tls=ServerTls(b"", b""))
    assert way_from_afar(safe, CONTACT, "far", "its owner") == ("grpcs://10.0.0.1:50051", {"LATTICE_TOKEN": "secret"})


@pytest.mark.parametrize(("cpus", "whole"), [(0.5, 1.0), (2.0, 2.0), (2.9, 2.0)])
def test_ray_counts_whole_cpus(cpus: float, whole: float) -> None:
    assert bundle_of(cpus, 0) == {"CPU": whole}


def test_names_of_resources_have_nothing_in_them_that_ray_separates_by() -> None:
    assert resource_of("gpu-1.rack") == "lattice-node-gpu-1.rack"
    odd = [resource_of(name) for name in ("a,b", "a=b", "a b", "ä", "")]
    assert len(set(odd)) == len(odd)
    assert all(name.isascii() and not set(name) & set(",= ") for name in odd)


def test_the_flags_of_a_worker_are_the_offer_of_its_machine() -> None:
    gpus = (Gpu(0, memory_bytes=7), Gpu(1, memory_bytes=7))
    offer = offer_of_machine(Capacity(2.5, 9, gpus), {"zone": "eu"})
    assert offer == Offer(2.5, 2, 9, 7, {"zone": "eu"})
    flags = worker_flags(offer, worker_id="w", node_id="n", store_directory=None, server="10.0.0.1:50051")
    told = dict(zip(flags[:4:2], flags[1:4:2], strict=True)) | dict(zip(flags[5::2], flags[6::2], strict=True))
    assert flags[4] == "--exit-on-close"
    assert told == {
        "--worker-id": "w",
        "--node-id": "n",
        "--num-cpus": "2.5",
        "--num-gpus": "2",
        "--memory-bytes": "9",
        "--gpu-memory-bytes": "7",
        "--label": "zone=eu",
    }


def test_a_resource_without_an_offer_is_measured() -> None:
    offer = offer_of_machine(Capacity(1.0), {})
    flags = worker_flags(offer, worker_id="w", node_id="n", store_directory=Path("/store"), server="10.0.0.1:7")
    assert flags[5:] == ["--store-dir", "/store", "--server", "10.0.0.1:7", "--num-cpus", "1.0", "--num-gpus", "0"]


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", ""])
def test_a_client_in_a_task_dials_this_machine_when_the_server_listens_everywhere(host: str) -> None:
    flags = worker_flags(Offer(), worker_id="w", node_id="n", store_directory=Path("/store"), server=f"{host}:7")
    assert flags[-2:] == ["--server", "127.0.0.1:7"]


def test_a_worker_that_cannot_start_is_tried_more_and_more_seldom() -> None:
    (reservation,) = own()
    waits = [reservation.lose(0.0) for _ in range(8)]
    assert waits[:2] == [MIN_BACKOFF_S, 2 * MIN_BACKOFF_S]
    assert waits == sorted(waits)
    assert waits[-1] == MAX_BACKOFF_S
    # One that lives only for a moment has hardly started.
    reservation.placed_at = 10.0
    assert reservation.lose(10.0 + MIN_BACKOFF_S) == MAX_BACKOFF_S
    reservation.placed_at = 10.0
    assert reservation.lose(11.0 + MAX_BACKOFF_S) == MIN_BACKOFF_S
    assert not reservation.is_placed


@pytest.mark.parametrize(
    ("host", "is_expected"),
    [
        *((host, "127.0.0.1".__eq__) for host in ("127.0.0.1", "127.0.0.5", "localhost", "::1", "[::1]")),
        ("10.1.2.3", "10.1.2.3".__eq__),
        ("0.0.0.0", lambda found: found not in {"0.0.0.0", ""}),
    ],
)
def test_ray_listens_where_the_server_does(host: str, is_expected: Callable[[str], bool]) -> None:
    assert is_expected(ray_interface(host))


@pytest.mark.parametrize(
    ("addresses", "expected"), [(["127.0.0.1", "10.1.2.3"], "10.1.2.3"), (["127.0.0.1"], "127.0.0.1")]
)
def test_on_a_network_that_leads_nowhere_ray_listens_there(
    addresses: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It cannot be connected to, as without a route.
    monkeypatch.setattr(bind_address, "ELSEWHERE", ("255.255.255.255", 9))
    found = {address: [SimpleNamespace(family=socket.AF_INET, address=address)] for address in addresses}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    assert ray_interface("0.0.0.0") == expected
