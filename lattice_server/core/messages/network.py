"""Owns the facts about the connections of sandboxed attempts to servers."""

from lattice_server.core.frozen import frozen
from lattice_server.core.symbol import Symbol


class NetworkVerdict(Symbol):
    """The decision of a worker about a connection; every value but `ALLOWED` is a refusal or a failure."""

    ALLOWED = "allowed"
    NOT_LISTED = "not_listed"
    ADDRESS_REFUSED = "address_refused"
    UNRESOLVED = "unresolved"
    UNREACHABLE = "unreachable"
    NAME_DIFFERS = "name_differs"
    MALFORMED = "malformed"


@frozen
class NetworkAccess:
    """The connections of an attempt to one server that ended with one verdict; `message` is the reason, for people.

    `is_final` says that these are the totals of the attempt, and not those of its first connection.
    """

    host: str
    port: int
    verdict: NetworkVerdict
    message: str
    address: str
    connections: int
    sent_bytes: int
    received_bytes: int
    is_final: bool
