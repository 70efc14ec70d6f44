"""Owns which tenant a resource belongs to. Rule: an id is unique within a tenant, and other tenants do not find it.

The server identifies a run by its key: the id and the tenant, or the id alone for the tenant without a name. So two
tenants may use the same id.
"""

from collections import OrderedDict
from typing import TypeVar

from lattice_server.core.frozen import frozen

Item = TypeVar("Item")
SEPARATOR = "\n"  # Neither ids nor tenants contain it.


@frozen
class Reach:
    """The tenants whose resources a caller may name: its own, which comes first, and with `is_any` all others."""

    tenant: str = ""
    is_any: bool = False

    def covers(self, tenant: str) -> bool:
        """Whether the resources of a tenant may be named."""
        return self.is_any or tenant == self.tenant


UNNAMED = Reach()
EVERYTHING = Reach(is_any=True)
# A worker gets the code of all tenants. The functions that its tasks spawn are stored for no tenant.
WORKERS = Reach("*", is_any=True)


def key_of(own_id: str, tenant: str) -> str:
    """Return the key of a tenant's resource among those of all tenants."""
    return f"{own_id}{SEPARATOR}{tenant}" if tenant else own_id


def id_of(key: str) -> str:
    """Return the id in a key."""
    return key.partition(SEPARATOR)[0]


class Shelf(OrderedDict[str, Item]):
    """Resources by key, oldest first, which callers find by id."""

    def __init__(self) -> None:
        super().__init__()
        # By id: the tenants with a name that use it.
        self._tenants: dict[str, dict[str, None]] = {}

    def find(self, own_id: str, reach: Reach) -> Item | None:
        """Return the resource that a caller means by an id; None when there is none within its reach."""
        found = self.get(key_of(own_id, reach.tenant))
        if found is None and reach.is_any:
            newest_first = reversed(self._tenants.get(own_id, {}))
            found = next((item for tenant in ("", *newest_first) if (item := self.get(key_of(own_id, tenant)))), None)
        return found

    def __setitem__(self, key: str, item: Item) -> None:
        own_id, _, tenant = key.partition(SEPARATOR)
        if tenant:
            self._tenants.setdefault(own_id, {})[tenant] = None
        super().__setitem__(key, item)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        own_id, _, tenant = key.partition(SEPARATOR)
        if tenant:
            tenants = self._tenants[own_id]
            del tenants[tenant]
            if not tenants:
                del self._tenants[own_id]
