"""Owns which tenant a thing belongs to. Rule: an id is a name within a tenant; another tenant's thing is not found.

Inside the server a run goes by its key, which is its id alone for the tenant without a name. So two tenants may use
the same id, and neither learns of the other.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
SEPARATOR = "\n"  # Neither ids nor tenants have it.


@dataclass(frozen=True, slots=True)
class Reach:
    """Whose things a caller may name: those of its tenant, which come first, and with `is_any` those of all tenants."""

    tenant: str = ""
    is_any: bool = False

    def covers(self, tenant: str) -> bool:
        """Whether a tenant's things may be named."""
        return self.is_any or tenant == self.tenant


UNNAMED = Reach()
EVERYTHING = Reach(is_any=True)
# A worker has the code of all tenants' tasks, and what its tasks spawn is kept for none of them.
WORKERS = Reach("*", is_any=True)


def key_of(own_id: str, tenant: str) -> str:
    """Return what names a tenant's thing among those of all tenants."""
    return f"{own_id}{SEPARATOR}{tenant}" if tenant else own_id


def id_of(key: str) -> str:
    """Return the id that callers know a thing by."""
    return key.partition(SEPARATOR)[0]


class Shelf(OrderedDict[str, Item]):
    """Things by key, oldest first, which callers find by id."""

    def __init__(self) -> None:
        super().__init__()
        # The tenants with a name that have a thing by an id.
        self._tenants: dict[str, dict[str, None]] = {}

    def find(self, own_id: str, reach: Reach) -> Item | None:
        """Return the thing a caller means by an id; None when there is none within its reach."""
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
