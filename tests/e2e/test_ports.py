"""A server on loopback opens no port to other machines, Ray's own ports included."""

from ipaddress import ip_address

import psutil

from lattice_client import LatticeClient


def test_nothing_listens_beyond_loopback(client: LatticeClient) -> None:
    server = psutil.Process(client.server_info().pid)
    listening = {
        (process.name(), connection.laddr.ip)
        for process in [server, *server.children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    assert not {found for found in listening if not ip_address(found[1].removeprefix("::ffff:")).is_loopback}
