"""Which addresses a sandbox may be connected to.

Rule: only addresses of the public internet that are not this machine's own, and those of the networks that the operator
names. An address that stands for an IPv4 address, such as `::ffff:10.0.0.1`, counts as that one.
"""

import ipaddress
import socket
from collections.abc import Iterable, Sequence

import psutil

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Not public either, although some versions of Python call them so. Some clouds serve a machine its keys at one of them.
INNER = tuple(
    map(
        ipaddress.ip_network,
        ("192.0.0.0/24", "168.63.129.16/32", "64:ff9b:1::/48", "2001::/23", "3fff::/20", "5f00::/16"),
    )
)
# The last 32 bits of these networks are the IPv4 address that a gateway connects to.
EMBEDDING = (
    ipaddress.ip_network("::/96"),
    ipaddress.ip_network("::ffff:0:0/96"),
    ipaddress.ip_network("64:ff9b::/96"),
)


def networks_of(text: str) -> tuple[Network, ...]:
    """Return the networks of a list such as `10.1.0.0/16,fd00::/8`. Raises ValueError."""
    return tuple(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())


def refusal(text: str, allowed: Sequence[Network], own: Iterable[str] | None = None) -> str:
    """Return why a sandbox may not be connected to an address; empty when it may.

    `allowed` are the networks that the operator names; `own` are this machine's addresses, by default as they are now.
    """
    address = plain(ipaddress.ip_address(text.partition("%")[0]))
    if any(address in network for network in allowed):
        return ""
    if not address.is_global or address.is_multicast or any(address in network for network in INNER):
        return f"{address} is not an address of the public internet"
    if str(address) in (own_addresses() if own is None else own):
        return f"{address} is this machine"
    return ""


def plain(address: Address) -> Address:
    """Return an address, or the IPv4 address that it stands for."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if any(address in network for network in EMBEDDING):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address.sixtofour is not None:
        return address.sixtofour
    # Teredo: the connection reaches the client at the end of the tunnel.
    return address.teredo[1] if address.teredo is not None else address


def own_addresses() -> set[str]:
    """Return the addresses of this machine's interfaces."""
    found = (each for interface in psutil.net_if_addrs().values() for each in interface)
    texts = [each.address.partition("%")[0] for each in found if each.family in {socket.AF_INET, socket.AF_INET6}]
    return {str(plain(ipaddress.ip_address(text))) for text in texts}
