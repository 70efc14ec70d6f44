"""Owns the count of a store by tenant, and the order of eviction.

Rules: an entry with several references counts once. A tenant over its own bound loses its own entries. When all tenants
together are over the whole bound, the tenant with the most loses some; so no tenant loses any to one that has more.
"""

from collections import OrderedDict
from dataclasses import dataclass

from lattice_server.core.errors import ExhaustedError
from lattice_server.core.frozen import frozen


@frozen
class Bound:
    """The size that a store may have: `total` in all, of which one tenant may have a `share`."""

    total: int
    share: float = 1.0

    @property
    def of_tenant(self) -> int:
        """How much one tenant may have."""
        return int(self.total * self.share)


@dataclass(slots=True)
class _Held:
    size: int
    holders: int = 0


class Usage:
    """The sizes of the entries of one store, called `what`, by tenant and name."""

    def __init__(self, what: str, bound: Bound) -> None:
        self.what = what
        self.bound = bound
        self.total = 0
        self._held: dict[tuple[str, str], _Held] = {}
        self._by_tenant: dict[str, int] = {}

    def hold(self, tenant: str, name: str, size: int) -> None:
        """Add one reference to an entry; its size counts with the first."""
        held = self._held.get((tenant, name))
        if held is None:
            held = self._held[tenant, name] = _Held(size)
            self.add(tenant, size)
        held.holders += 1

    def release(self, tenant: str, name: str) -> None:
        """Release one reference to an entry; its size counts until the last one is released."""
        held = self._held[tenant, name]
        held.holders -= 1
        if not held.holders:
            del self._held[tenant, name]
            self.add(tenant, -held.size)

    def holds(self, tenant: str, name: str) -> bool:
        """Whether a tenant has an entry."""
        return (tenant, name) in self._held

    def size_of(self, tenant: str, name: str) -> int:
        """Return the size of an entry of a tenant."""
        return self._held[tenant, name].size

    def of(self, tenant: str) -> int:
        """Return how much a tenant has."""
        return self._by_tenant.get(tenant, 0)

    def is_over(self, tenant: str, added: int = 0) -> bool:
        """Whether a tenant has, or with `added` would have, more than one tenant may."""
        return self.of(tenant) + added > self.bound.of_tenant

    def is_full(self, added: int = 0) -> bool:
        """Whether all have, or with `added` would have, more than they may together."""
        return self.total + added > self.bound.total

    def has_most(self, tenant: str) -> bool:
        """Whether no tenant has more than this one."""
        return self.of(tenant) >= max(self._by_tenant.values(), default=0)

    def refusal(self, tenant: str, added: int) -> ExhaustedError | None:
        """Return why a tenant may not have `added` more; None when it may."""
        if self.is_over(tenant, added):
            has, may, whose = self.of(tenant), self.bound.of_tenant, "one tenant"
        elif self.is_full(added):
            has, may, whose = self.total, self.bound.total, "all tenants together"
        else:
            return None
        text = f"{has} bytes of {self.what} are kept, and {added} more are over the {may} bytes that {whose} may have"
        metadata = {"store": self.what, "kept_bytes": str(has), "limit_bytes": str(may)}
        return ExhaustedError("STORE_FULL", text, metadata=metadata)

    def add(self, tenant: str, size: int) -> None:
        """Add to the size of a tenant without naming an entry; a negative size subtracts."""
        self.total += size
        self._by_tenant[tenant] = self.of(tenant) + size
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]


class Evictable:
    """The entries of a `usage` that may be evicted, by tenant: those marked as `sooner` first, then the oldest."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self._queues: dict[str, tuple[OrderedDict[str, None], OrderedDict[str, None]]] = {}

    def __len__(self) -> int:
        return sum(len(part) for queue in self._queues.values() for part in queue)

    def add(self, tenant: str, name: str, *, sooner: bool = True) -> None:
        """Let an entry be evicted, after all others with the same mark."""
        self.discard(tenant, name)
        queue = self._queues.setdefault(tenant, (OrderedDict(), OrderedDict()))
        queue[0 if sooner else 1][name] = None

    def discard(self, tenant: str, name: str) -> None:
        """Let an entry be evicted no longer, if it might."""
        for part in (queue := self._queues.get(tenant, ())):
            part.pop(name, None)
        if queue and not any(queue):
            del self._queues[tenant]

    def victim(self, tenant: str, spared: str = "") -> tuple[str, str] | None:
        """Return the tenant and name of the next entry to evict, after this tenant got another one.

        None when the bounds are kept, or no entry but `spared` may be evicted.
        """
        if self._usage.is_over(tenant) and (found := self._first(tenant, spared)):
            return tenant, found
        if not self._usage.is_full():
            return None
        # Tenants that have less than this one lose nothing to it.
        losers = [other for other in self._queues if self._usage.of(other) >= self._usage.of(tenant)]
        for loser in sorted(losers, key=self._usage.of, reverse=True):
            if found := self._first(loser, spared):
                return loser, found
        return None

    def _first(self, tenant: str, spared: str) -> str:
        return next((name for part in self._queues.get(tenant, ()) for name in part if name != spared), "")
