"""Owns the messages between services, on the main thread, and the scheduler, whose tasks need them."""

from lattice_server.core.frozen import frozen
from lattice_server.core.model import Failure


@frozen
class ServiceChanged:
    """A service, by its key, is in another condition.

    Attributes:
        key: its name, unique among all tenants.
        is_ready: whether it takes requests.
        nodes: the nodes that reach it then; None for all.
        detail: why it is not ready, in words for people.
        failure: why it never will be.
    """

    key: str
    is_ready: bool = False
    nodes: frozenset[str] | None = None
    detail: str = ""
    failure: Failure | None = None


@frozen
class ServiceNeeded:
    """So many tasks wait for a service, and so many others that need it have not ended."""

    key: str
    waiting: int
    others: int
