"""Owns the choice of the address at which Ray, and gateways, listen. Rule: never more open than the server itself."""

import socket
from ipaddress import ip_address

import psutil

LOOPBACK = "127.0.0.1"
ANY = {"", "0.0.0.0", "::", "[::]"}
# Nothing is sent there: it only asks for the route that leads to other networks.
ELSEWHERE = ("192.0.2.1", 9)


def ray_interface(host: str) -> str:
    """Return the IPv4 address for Ray of a server that listens on `host`. Raises OSError for a name without one."""
    if host in ANY:
        return _machine_address()
    plain = host.strip("[]")
    if plain == "::1":
        return LOOPBACK
    found = str(socket.getaddrinfo(plain, None, socket.AF_INET)[0][4][0])
    # For any other loopback address Ray listens on all interfaces.
    return LOOPBACK if ip_address(found).is_loopback else found


def address_for_others(host: str) -> str:
    """Return the address by which other machines reach this one, of a server that listens on `host`."""
    plain = host.strip("[]")
    if plain not in ANY:
        try:
            return str(ip_address(plain))
        except ValueError:
            pass  # A name.
    try:
        return ray_interface(host)
    except OSError:
        return LOOPBACK


def _machine_address() -> str:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(ELSEWHERE)
            return str(probe.getsockname()[0])
    except OSError:  # no route leads anywhere: a network of its own
        found = [
            address.address
            for addresses in psutil.net_if_addrs().values()
            for address in addresses
            if address.family == socket.AF_INET and not address.address.startswith("127.")
        ]
        return found[0] if found else LOOPBACK
