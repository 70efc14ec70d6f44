"""The servers that a sandbox may connect to: answers for honest code, attempts of hostile code, reports to the agent.

The program `egress_program` runs all of it once, with real sockets between network namespaces.
"""

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from lattice_worker.egress import addresses
from lattice_worker.egress.servers import AllowList, authority
from lattice_worker.sandbox.network import endpoints
from lattice_worker.sandbox.policy import LEVELS
from tests.sandbox import connections, table

needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces need root and iproute2"
)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """All outcomes, by level and by name."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sandbox.egress_program"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@needs_namespaces
@pytest.mark.parametrize("name", connections.ROWS)
@pytest.mark.parametrize("level", LEVELS)
def test_connection_ends_as_its_row_says(level: str, name: str, found: dict[str, Any]) -> None:
    row, outcome = connections.ROWS[name], found[level]["outcomes"][name]
    assert (outcome.startswith(row.outcome), row.text in outcome) == (True, True), outcome
    accesses = [f"{access['host']}:{access['port']} {access['verdict']}" for access in found[level]["final"]]
    assert not row.access or row.access in accesses


@needs_namespaces
@pytest.mark.parametrize("level", LEVELS)
def test_agent_learns_of_every_access_once_at_first_and_once_in_full(level: str, found: dict[str, Any]) -> None:
    expected = {row.access for row in connections.ROWS.values() if row.access} | {"rebind.test:80 allowed"}
    for when in ("first", "final"):
        told = [f"{access['host']}:{access['port']} {access['verdict']}" for access in found[level][when]]
        assert sorted(told) == sorted(expected)
    assert {access["connections"] for access in found[level]["first"]} == {1}


@needs_namespaces
@pytest.mark.parametrize("level", LEVELS)
def test_bytes_are_counted_by_server(level: str, found: dict[str, Any]) -> None:
    by_server = {(a["host"], a["port"], a["verdict"]): a for a in found[level]["final"]}
    plain = by_server["api.test", 80, "allowed"]
    assert 3_000_000 < plain["sent_bytes"] < 3_002_000
    assert 0 < plain["received_bytes"] < 2000
    assert plain["address"] == "11.1.0.1"
    assert all(a["sent_bytes"] == 0 for key, a in by_server.items() if key[2] != "allowed")


@needs_namespaces
def test_another_sandbox_is_served_while_one_floods_the_proxies(found: dict[str, Any]) -> None:
    flooded = found["flooded"]
    assert flooded["flood"] == {"refused": 1500, "answered": True}
    assert flooded["was_flooding"]
    assert "api.test" in flooded["honest"]


@needs_namespaces
def test_accesses_of_a_flood_are_bounded_and_none_is_lost(found: dict[str, Any]) -> None:
    final = [access for access in found["flooded"]["final"] if access["verdict"] == "not_listed"]
    assert len(found["flooded"]["first"]) <= 104
    assert sum(access["connections"] for access in final) == 1500
    assert [access["host"] for access in final if access["connections"] > 1] == [""]


@needs_namespaces
def test_connections_end_with_their_attempt_and_are_counted(found: dict[str, Any]) -> None:
    (access,) = found["ended"]["final"]
    assert (access["verdict"], access["connections"]) == ("allowed", 1)
    assert access["received_bytes"] > 100


@needs_namespaces
def test_attempt_is_ended_when_the_proxies_die_and_the_next_one_has_new_ones(found: dict[str, Any]) -> None:
    assert found["lost"]["lost"]
    assert "api.test" in found["lost"]["after"]


@needs_namespaces
def test_hosts_of_the_sandbox_are_the_listed_names_and_no_wildcard(found: dict[str, Any]) -> None:
    names = [line.split()[1] for line in found["variables"]["hosts"].splitlines()]
    assert names == ["localhost", "localhost", "api.test"]
    assert found["variables"]["https_proxy"] == "http://127.0.0.1:3128"


@pytest.mark.parametrize(
    "address",
    [
        *("10.0.0.1", "172.16.0.1", "192.168.1.1", "127.0.0.1", "127.255.0.1", "169.254.169.254", "0.0.0.0"),
        *("100.64.0.1", "100.100.100.200", "192.0.0.192", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
        *("168.63.129.16", "::", "::1", "fe80::1", "fe80::1%eth0", "fd00:ec2::254", "ff02::1", "2001:db8::1"),
        *("::ffff:10.0.0.1", "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1"),
        "2001:0:0:0:0:0:5601:5601",  # Teredo: the client is 169.254.169.254, its bits inverted.
    ],
)
def test_address_that_is_not_of_the_public_internet_is_refused(address: str) -> None:
    assert addresses.refusal(address, (), set())


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_address_of_the_public_internet_is_allowed(address: str) -> None:
    assert addresses.refusal(address, (), set()) == ""


def test_address_of_this_machine_is_refused_however_it_is_written() -> None:
    assert addresses.refusal("8.8.8.8", (), {"8.8.8.8"})
    assert addresses.refusal("::ffff:8.8.8.8", (), {"8.8.8.8"})
    assert "127.0.0.1" in addresses.own_addresses()


def test_address_of_a_network_that_the_operator_names_is_allowed() -> None:
    networks = addresses.networks_of("10.1.0.0/16, fd00::/8")
    assert addresses.refusal("10.1.2.3", networks, set()) == ""
    assert addresses.refusal("::ffff:10.1.2.3", networks, set()) == ""
    assert addresses.refusal("fd00::5", networks, set()) == ""
    assert addresses.refusal("10.2.0.1", networks, set())
    with pytest.raises(ValueError, match="x"):
        addresses.networks_of("x")


@pytest.mark.parametrize(
    ("name", "port", "is_allowed"),
    [
        ("api.example.com", 443, True),
        ("api.example.com", 80, False),
        ("example.com", 443, False),
        ("a.wild.com", 443, True),
        ("a.b.wild.com", 443, True),
        ("wild.com", 443, False),
        ("evilwild.com", 443, False),
        (".wild.com", 443, False),
        ("a..wild.com", 443, False),
        ("*.wild.com", 443, True),
        ("", 443, False),
    ],
)
def test_list_allows_the_names_and_ports_that_it_has(name: str, port: int, is_allowed: bool) -> None:
    assert AllowList(["api.example.com:443", "*.wild.com:443"]).allows(name, port) == is_allowed


def test_list_without_entries_allows_nothing() -> None:
    assert not AllowList([]).allows("", 0)
    assert not AllowList([]).allows("example.com", 443)


@pytest.mark.parametrize(
    ("text", "found"),
    [("A.Example.com.:443", ("a.example.com", 443)), ("a:1", ("a", 1)), ("[::1]:80", ("[::1]", 80))],
)
def test_authority_is_a_name_in_lower_case_and_a_port(text: str, found: tuple[str, int]) -> None:
    assert authority(text) == found


@pytest.mark.parametrize("text", ["", ":", "a", "a:", "a:0", "a:65536", "a:-1", "a:٤٤٣", "a:4 4", ":443", "é:443"])
def test_authority_is_refused_when_it_names_no_server(text: str) -> None:
    with pytest.raises(ValueError, match="names no"):
        authority(text)


def test_each_name_has_one_address_and_each_port_a_socket() -> None:
    found = [(each.host, each.address, each.port) for each in endpoints(["a.b:443", "a.b:80", "*.c:443", "d.e:443"])]
    assert found[1:] == [("a.b", "127.1.0.1", 443), ("a.b", "127.1.0.1", 80), ("d.e", "127.1.0.2", 443)]


def test_page_has_the_tables_of_attempts() -> None:
    page = table.PAGE.read_text()
    assert page == table.written(page), "run `python -m tests.sandbox.table`"
