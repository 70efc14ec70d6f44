"""Converts the servers that a sandbox may connect to, and the facts about its connections."""

import re
from collections.abc import Sequence

from lattice.v1 import run_pb2

from lattice_server.core.errors import invalid_field
from lattice_server.core.messages import NetworkAccess, NetworkVerdict
from lattice_server.core.model import Isolation

MAX_SERVERS = 64
MAX_NAME = 253
MAX_MESSAGE = 500  # Characters.
MAX_PORT = 65535
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
# The last label has a letter that no number has: resolvers take 1.2.3.4, 0x7f.1 and 2130706433 for addresses.
_SERVER = re.compile(rf"(?:\*\.)?(?P<name>(?:{_LABEL}\.)*(?![0-9]+:|0x[0-9a-f]*:){_LABEL}):(?P<port>[1-9][0-9]{{0,4}})")
VERDICTS = {
    run_pb2.NETWORK_VERDICT_ALLOWED: NetworkVerdict.ALLOWED,
    run_pb2.NETWORK_VERDICT_NOT_LISTED: NetworkVerdict.NOT_LISTED,
    run_pb2.NETWORK_VERDICT_ADDRESS_REFUSED: NetworkVerdict.ADDRESS_REFUSED,
    run_pb2.NETWORK_VERDICT_UNRESOLVED: NetworkVerdict.UNRESOLVED,
    run_pb2.NETWORK_VERDICT_UNREACHABLE: NetworkVerdict.UNREACHABLE,
    run_pb2.NETWORK_VERDICT_NAME_DIFFERS: NetworkVerdict.NAME_DIFFERS,
    run_pb2.NETWORK_VERDICT_MALFORMED: NetworkVerdict.MALFORMED,
}
_TO_PROTO = {verdict: number for number, verdict in VERDICTS.items()}


def network_from_proto(servers: Sequence[str], isolation: Isolation, field: str) -> tuple[str, ...]:
    """Check and return the servers that a task of a level of isolation may connect to, in lower case.

    Raises InvalidError naming the field.
    """
    if not servers:
        return ()
    if isolation is Isolation.NONE:
        text = (
            "restricts a sandbox: ask for isolation 'subprocess', 'seccomp' or 'docker'; without one any is reachable"
        )
        raise invalid_field(field, text)
    if len(servers) > MAX_SERVERS:
        raise invalid_field(field, f"has {len(servers)} entries; the most are {MAX_SERVERS}")
    return tuple(dict.fromkeys(_server(server, f"{field}[{index}]") for index, server in enumerate(servers)))


def _server(text: str, field: str) -> str:
    found = _SERVER.fullmatch(text.lower())
    if found is None or len(found["name"]) > MAX_NAME or int(found["port"]) > MAX_PORT:
        expected = "a host name in ASCII and a port, such as api.example.com:443 or *.example.com:443, and no address"
        raise invalid_field(field, f"must be {expected}, not {text[:MAX_NAME]!r}")
    return text.lower()


def access_from_proto(message: run_pb2.NetworkAccess) -> NetworkAccess:
    """Return the facts about connections. A verdict that is not known counts as one that allowed nothing."""
    return NetworkAccess(
        message.host[:MAX_NAME],
        message.port,
        VERDICTS.get(message.verdict, NetworkVerdict.MALFORMED),
        message.message[:MAX_MESSAGE],
        message.address[:MAX_NAME],
        message.connections,
        message.sent_bytes,
        message.received_bytes,
        message.final,
    )


def access_to_proto(access: NetworkAccess) -> run_pb2.NetworkAccess:
    """Return the message of facts about connections."""
    return run_pb2.NetworkAccess(
        host=access.host,
        port=access.port,
        verdict=_TO_PROTO[access.verdict],
        message=access.message,
        address=access.address,
        connections=access.connections,
        sent_bytes=access.sent_bytes,
        received_bytes=access.received_bytes,
        final=access.is_final,
    )
