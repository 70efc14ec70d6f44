"""Owns the choice of the instance for a request. Rule: new routes of the server replace the earlier ones."""

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Target:
    """An instance, and where requests to it go: itself, a provider, or the `gateway` of such a name on its node."""

    instance_id: str
    endpoint: str
    gateway: str = ""

    @property
    def is_outside(self) -> bool:
        """Whether it is a provider, whose endpoint is a URL."""
        return "://" in self.endpoint

    def url(self, path: str) -> str:
        """Return the URL of a request whose path begins with the version of the API."""
        if self.is_outside:
            return self.endpoint + path.removeprefix("/v1")
        return f"{'https' if self.gateway else 'http'}://{self.endpoint}{path}"


@dataclass(frozen=True, slots=True)
class Route:
    """One model: its name for the engine, the key of the engine, and the addresses of its instances by name.

    `replicas` are the instances of this node, or the provider. `remote` are those of other nodes, each with the address
    and the name of the gateway there. It `is_away` when instances are ready on other nodes only, whose gateways are not
    reached. One that `has_budget` needs a permit for each request; `tokens` is its limit of tokens in a window, if any.
    """

    model: str
    key: str
    replicas: Mapping[str, str]
    remote: Mapping[str, Sequence[str]] = field(default_factory=dict)
    is_away: bool = False
    has_budget: bool = False
    tokens: int | None = None

    @property
    def targets(self) -> list[Target]:
        """The instances, those of this node first."""
        here = [Target(name, endpoint) for name, endpoint in self.replicas.items()]
        return here + [Target(name, endpoint, gateway) for name, (endpoint, gateway) in self.remote.items()]


class Routing:
    """The models by service, and how many requests each of their instances has from here.

    `news` is set, and replaced, when the routes are.
    """

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self._routes: dict[str, Route] = {}
        self._in_flight: Counter[str] = Counter()

    def update(self, services: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace the routes."""
        self._routes = {name: Route(**found) for name, found in services.items()}
        self.news.set()
        self.news = asyncio.Event()

    def find(self, service: str) -> Route | None:
        """Return a route."""
        return self._routes.get(service)

    def targets(self, service: str) -> list[Target]:
        """Return the instances of a service, those of this node first."""
        route = self._routes.get(service)
        return [] if route is None else route.targets

    def choose(self, service: str, without: Collection[Target] = ()) -> Target | None:
        """Return the instance with the fewest requests, of equal ones one of this node; None when there is none."""
        found = [target for target in self.targets(service) if target not in without]
        return min(found, key=lambda target: self._in_flight[target.instance_id], default=None)

    def begin(self, instance_id: str) -> None:
        """Count a request."""
        self._in_flight[instance_id] += 1

    def end(self, instance_id: str) -> None:
        """Count the end of a request."""
        self._in_flight[instance_id] -= 1
        if self._in_flight[instance_id] <= 0:
            del self._in_flight[instance_id]
