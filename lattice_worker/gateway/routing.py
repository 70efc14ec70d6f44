"""Owns the choice of the instance for a request. Rule: pure; new routes of the server replace the earlier ones."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Route:
    """One model: its name for the engine, the key of the engine, and its instances by name.

    It `is_away` when its instances are ready on other nodes only, and listen there for those nodes alone. One that
    `has_budget` needs a permit for each request; `tokens` is its limit of tokens in a window, if any.
    """

    model: str
    key: str
    replicas: Mapping[str, str]
    is_away: bool = False
    has_budget: bool = False
    tokens: int | None = None


class Routing:
    """The models by service, and how many requests each of their instances has from here."""

    def __init__(self) -> None:
        self._routes: dict[str, Route] = {}
        self._in_flight: Counter[str] = Counter()

    def update(self, services: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace the routes."""
        self._routes = {name: Route(**found) for name, found in services.items()}

    def find(self, service: str) -> Route | None:
        """Return a route."""
        return self._routes.get(service)

    def choose(self, service: str, without: Collection[str] = ()) -> tuple[str, str] | None:
        """Return the name and the address of the instance with the fewest requests; None when there is none left."""
        route = self._routes.get(service)
        found = [] if route is None else [name for name in route.replicas if name not in without]
        if route is None or not found:
            return None
        best = min(found, key=lambda name: self._in_flight[name])
        return best, route.replicas[best]

    def begin(self, instance_id: str) -> None:
        """Count a request."""
        self._in_flight[instance_id] += 1

    def end(self, instance_id: str) -> None:
        """Count the end of a request."""
        self._in_flight[instance_id] -= 1
        if self._in_flight[instance_id] <= 0:
            del self._in_flight[instance_id]
