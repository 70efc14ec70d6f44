"""Owns the keys by which attempts reach models. Rule: a key is of one attempt and one service, and ends with it.

A key is random and means nothing by itself; only a gateway that asks the server learns what it is for.
"""

import secrets
from collections.abc import Iterable

from lattice_server.core.frozen import frozen
from lattice_server.engine.services.entry import Use

PREFIX = "lk-"


@frozen
class Grant:
    """The grant of a key: requests to one service of a tenant."""

    tenant: str
    service: str
    use: Use
    node_id: str


class Keys:
    """The keys that are valid."""

    def __init__(self) -> None:
        self._grants: dict[str, Grant] = {}
        self._of_use: dict[Use, dict[str, str]] = {}

    def __len__(self) -> int:
        return len(self._grants)

    def issue(self, tenant: str, service: str, use: Use, node_id: str) -> str:
        """Return the key of an attempt for a service; it is the same each time."""
        of_use = self._of_use.setdefault(use, {})
        if service not in of_use:
            key = of_use[service] = PREFIX + secrets.token_urlsafe(32)
            self._grants[key] = Grant(tenant, service, use, node_id)
        return of_use[service]

    def find(self, key: str, node_id: str | None) -> Grant | None:
        """Return the grant of a key that a request from a node has; None when it is not valid, or not there."""
        grant = self._grants.get(key)
        return None if grant is None or grant.node_id != node_id else grant

    def nodes(self) -> set[str]:
        """Return the nodes of the attempts that have keys."""
        return {grant.node_id for grant in self._grants.values()}

    def revoke(self, uses: Iterable[Use]) -> list[str]:
        """End the keys of attempts; return them."""
        ended = [key for use in uses for key in self._of_use.pop(use, {}).values()]
        for key in ended:
            del self._grants[key]
        return ended
