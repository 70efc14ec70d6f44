"""A server on loopback opens no port to other machines, Ray's own ports included."""

from contextlib import suppress
from ipaddress import ip_address

import psutil

from lattice_client import LatticeClient


def test_nothing_listens_beyond_loopback(client: LatticeClient) -> None:
    server = psutil.Process(client.server_info().pid)
    listening = set()
    for process in [server, *server.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # An idle process ends while others are looked at.
            found = [one for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
            listening.update((process.name(), one.laddr.ip) for one in found)
    assert listening
    assert not {found for found in listening if not ip_address(found[1].removeprefix("::ffff:")).is_loopback}
