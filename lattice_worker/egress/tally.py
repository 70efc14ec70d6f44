"""The count of the connections of one attempt, by server and verdict. Rule: its size is bounded."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

ALLOWED = "allowed"
NOT_LISTED = "not_listed"
ADDRESS_REFUSED = "address_refused"
UNRESOLVED = "unresolved"
UNREACHABLE = "unreachable"
NAME_DIFFERS = "name_differs"
MALFORMED = "malformed"
MAX_SERVERS = 100
MAX_NAME = 253


@dataclass(slots=True)
class Access:
    """The connections to one server with one verdict; see `NetworkAccess` of the contract."""

    host: str
    port: int
    verdict: str
    message: str = ""
    address: str = ""
    connections: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return it as the agent is sent it."""
        return asdict(self)


class Tally:
    """The accesses of one attempt. `on_first` takes the first connection of each."""

    def __init__(self, on_first: Callable[[Access], None]) -> None:
        self._on_first = on_first
        self._accesses: dict[tuple[str, int, str], Access] = {}

    def note(self, host: str, port: int, verdict: str, message: str = "", address: str = "") -> Access:
        """Count a connection. The bytes of one that is allowed are added to what this returns."""
        key = (host[:MAX_NAME], port, verdict)
        if key not in self._accesses and len(self._accesses) >= MAX_SERVERS:
            key = ("", 0, verdict)
        access = self._accesses.get(key)
        is_first = access is None
        if access is None:
            access = self._accesses[key] = Access(*key)
        access.connections += 1
        access.message, access.address = message, address
        if is_first:
            self._on_first(access)
        return access

    def all(self) -> list[Access]:
        """Return the accesses, in the order of their first connections."""
        return list(self._accesses.values())
