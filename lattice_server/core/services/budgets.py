"""Owns how much of a model may be used: requests and tokens in a window of time, and requests at once.

A request counts from when it is permitted until a window after its first byte came back. The provider counted it at
some moment in between, so that it cannot have counted more than its limit in any window, however it counts. Its tokens
are estimated first. The tokens that the answer reports replace the estimate.

A provider that says how much is left tells how much others use. That use is the difference between its count and the
count here; it is held back until the provider says that it is free again, for a window at most.

Rule: the waiting tenant with the least use goes next, and a smaller request never passes a larger request.
"""

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from lattice_server.core.frozen import frozen

MINUTE_S = 60.0
MAX_BACKOFF_S = 60.0


@frozen
class Limits:
    """The limits of one model; None for no limit. Those of a minute are counted over `window_s` seconds."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    window_s: float = MINUTE_S

    @property
    def requests(self) -> int | None:
        """The requests of one window."""
        return self._in_window(self.requests_per_minute)

    @property
    def tokens(self) -> int | None:
        """The tokens of one window."""
        return self._in_window(self.tokens_per_minute)

    def refusal(self, tokens: int) -> str:
        """Return why a request of so many tokens can never be permitted; empty when it can."""
        if self.tokens is not None and tokens > self.tokens:
            return f"the request is estimated at {tokens} tokens, and {self.tokens} are allowed in {self.window_s:g} s"
        return ""

    def narrowed(self, other: "Limits") -> "Limits":
        """Return limits that keep both."""
        return Limits(
            _least(self.requests_per_minute, other.requests_per_minute),
            _least(self.tokens_per_minute, other.tokens_per_minute),
            _least(self.concurrency, other.concurrency),
            min(self.window_s, other.window_s),
        )

    def _in_window(self, per_minute: int | None) -> int | None:
        return None if per_minute is None else max(1, int(per_minute * self.window_s / MINUTE_S))


def _least(one: int | None, other: int | None) -> int | None:
    return min((found for found in (one, other) if found is not None), default=None)


@dataclass(slots=True, eq=False)
class Request:
    """A request from when it asks to be permitted until it counts no more.

    Attributes:
        name: names it.
        tenant: whose request it is.
        holder: the gateway that makes it.
        tokens: how many tokens count.
        is_open: whether it has not ended.
        expires_at: when it counts no more; None before its first byte.
    """

    name: str
    tenant: str
    holder: str
    tokens: int
    is_open: bool = True
    expires_at: float | None = None


@frozen
class Use:
    """The use of a budget at one moment; `blocked_s` is for how much longer its provider wants no requests."""

    requests: int
    tokens: int
    open: int
    waiting: int
    blocked_s: float
    permitted: int
    refused: int


@frozen
class Left:
    """How much a provider says is left of one limit, and after how many seconds it will be whole again."""

    amount: int
    reset_s: float


class Elsewhere:
    """The use of one limit by others: the most that its provider has told, each until its reset.

    An answer tells less of it than there is when requests on their way were counted here and not there.
    """

    def __init__(self) -> None:
        self._told: list[tuple[float, int]] = []  # Until when, and how much.

    def add(self, amount: int, until: float) -> None:
        """Take the counts of the provider in an answer."""
        if amount > 0:
            self._told = [one for one in self._told if one[0] > until or one[1] > amount]
            self._told.append((until, amount))

    def at(self, now: float) -> int:
        """Return the use elsewhere that is held back at a time."""
        return max((amount for until, amount in self._told if until > now), default=0)

    def ends(self, now: float) -> list[float]:
        """Return the times after `now` at which less may be held."""
        return [until for until, _ in self._told if until > now]

    def forget(self, now: float) -> None:
        """Forget the use that is free again."""
        self._told = [one for one in self._told if one[0] > now]


@dataclass(slots=True, eq=False)
class Tenant:
    """The requests of one tenant that wait, in order, and its use in shares of the limits."""

    used: float
    waiting: deque[Request] = field(default_factory=deque)


class Budget:
    """The machine of one budget. Times are of one clock; methods return the requests that they permit, in order."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._requests: dict[str, Request] = {}  # Permitted, and not ended.
        self._expiring: list[tuple[float, int, Request]] = []
        self._numbers = 0
        self._tenants: dict[str, Tenant] = {}
        self._count = self._tokens = 0  # Of all that count.
        self._blocked_until = float("-inf")
        self._refusals = 0  # In a row, without a time.
        self._requests_elsewhere, self._tokens_elsewhere = Elsewhere(), Elsewhere()
        self.permitted = self.refused = 0

    def limit(self, limits: Limits, now: float) -> list[Request]:
        """Replace the limits."""
        self.limits = limits
        return self.tick(now)

    def ask(self, request: Request, now: float, *, is_again: bool = False) -> list[Request]:
        """Have a request wait; before others of its tenant if it `is_again` made after its provider refused it."""
        tenant = self._tenants.get(request.tenant)
        if tenant is None:
            # A tenant that begins to make requests has no claim to the earlier use of others.
            least = min((found.used for found in self._tenants.values()), default=0.0)
            tenant = self._tenants[request.tenant] = Tenant(least)
        (tenant.waiting.appendleft if is_again else tenant.waiting.append)(request)
        return self.tick(now)

    def answered(self, name: str, at: float, now: float) -> list[Request]:
        """Note that the first byte of an answer came at a time."""
        if (request := self._requests.get(name)) is not None:
            self._note_answered(request, at)
            self._refusals = 0
        return self.tick(now)

    def told(self, requests: Left | None, tokens: Left | None, now: float) -> list[Request]:
        """Take how much a provider says is left of each limit, if it says so."""
        limits = self.limits
        for left, limit, counted, elsewhere in (
            (requests, limits.requests, self._count, self._requests_elsewhere),
            (tokens, limits.tokens, self._tokens, self._tokens_elsewhere),
        ):
            if left is not None and limit is not None:
                # The provider has counted no more of these requests: a key without other users is never slowed down.
                elsewhere.add(limit - counted - left.amount, now + min(left.reset_s, limits.window_s))
        return self.tick(now)

    def end(self, name: str, now: float, *, tokens: int | None = None) -> list[Request]:
        """End a request, which used so many tokens if that is known. One that waits waits no more."""
        request = self._requests.pop(name, None)
        if request is None:
            self._withdraw(name)
            return self.tick(now)
        self._note_answered(request, now)
        request.is_open = False
        if tokens is not None and request.expires_at is not None and request.expires_at > now:
            change = tokens - request.tokens
            self._tokens += change
            self._tenants[request.tenant].used += self._share(change, requests=0)
            request.tokens = tokens
        return self.tick(now)

    def refuse(self, name: str, retry_after_s: float | None, now: float) -> list[Request]:
        """End a request that its provider refused: no other one is permitted for a time."""
        self.refused += 1
        if retry_after_s is None:
            self._refusals += 1
            retry_after_s = min(MAX_BACKOFF_S, 2.0 ** (self._refusals - 1))
        self._blocked_until = max(self._blocked_until, now + retry_after_s)
        return self.end(name, now)

    def lose(self, holder: str, now: float) -> list[Request]:
        """End all requests of a gateway that is gone."""
        for request in [found for found in self._requests.values() if found.holder == holder]:
            del self._requests[request.name]
            self._note_answered(request, now)
            request.is_open = False
        for tenant in self._tenants.values():
            tenant.waiting = deque(request for request in tenant.waiting if request.holder != holder)
        return self.tick(now)

    def tick(self, now: float) -> list[Request]:
        """Forget what counts no more, and permit as many requests as possible."""
        while self._expiring and self._expiring[0][0] <= now:
            request = heapq.heappop(self._expiring)[2]
            self._count -= 1
            self._tokens -= request.tokens
        self._requests_elsewhere.forget(now)
        self._tokens_elsewhere.forget(now)
        permitted = []
        while (head := self._head()) is not None and self._fits(head, now):
            tenant = self._tenants[head.tenant]
            tenant.waiting.popleft()
            tenant.used += self._share(head.tokens, requests=1)
            self._requests[head.name] = head
            self._count += 1
            self._tokens += head.tokens
            self.permitted += 1
            permitted.append(head)
        if not self._requests and not self._expiring:
            self._tenants = {name: tenant for name, tenant in self._tenants.items() if tenant.waiting}
        return permitted

    def next_deadline(self, now: float) -> float | None:
        """Return when `tick` may permit a request that waits; None when none waits, or only an end can."""
        if self._head() is None:
            return None
        if self._blocked_until > now:
            return self._blocked_until
        found = [at for one in (self._requests_elsewhere, self._tokens_elsewhere) for at in one.ends(now)]
        return min([*found, *(at for at, *_ in self._expiring[:1])], default=None)

    def use(self, now: float) -> Use:
        """Return the use at a moment after the last step."""
        waiting = sum(len(tenant.waiting) for tenant in self._tenants.values())
        over = [request.tokens for at, _, request in self._expiring if at <= now]
        blocked_s = max(0.0, self._blocked_until - now)
        counted = (self._count - len(over), self._tokens - sum(over), len(self._requests))
        return Use(*counted, waiting, blocked_s, self.permitted, self.refused)

    def check(self) -> None:
        """Assert every invariant; tests call it after each step."""
        counted = [request for *_, request in self._expiring]
        counted += [request for request in self._requests.values() if request.expires_at is None]
        assert len(counted) == self._count
        assert sum(request.tokens for request in counted) == self._tokens
        assert all(request.is_open for request in self._requests.values())
        assert not any(request.name in self._requests for request in self._waiting())
        if not self._count:
            assert self._tokens == 0

    def _note_answered(self, request: Request, at: float) -> None:
        if request.expires_at is None:
            request.expires_at = at + self.limits.window_s
            self._numbers += 1
            heapq.heappush(self._expiring, (request.expires_at, self._numbers, request))

    def _withdraw(self, name: str) -> None:
        for tenant in self._tenants.values():
            for request in tenant.waiting:
                if request.name == name:
                    tenant.waiting.remove(request)
                    return

    def _waiting(self) -> Iterable[Request]:
        return (request for tenant in self._tenants.values() for request in tenant.waiting)

    def _head(self) -> Request | None:
        """Return the first request of the tenant that used least."""
        waiting = [(tenant.used, name) for name, tenant in self._tenants.items() if tenant.waiting]
        return self._tenants[min(waiting)[1]].waiting[0] if waiting else None

    def _fits(self, request: Request, now: float) -> bool:
        limits = self.limits
        if now < self._blocked_until:
            return False
        if limits.concurrency is not None and len(self._requests) >= limits.concurrency:
            return False
        if limits.requests is not None and self._count + self._requests_elsewhere.at(now) >= limits.requests:
            return False
        tokens = self._tokens + self._tokens_elsewhere.at(now)
        # One that is alone is permitted: its limit may have been lowered since it was asked for.
        is_alone = not self._count and tokens == self._tokens
        return limits.tokens is None or is_alone or tokens + request.tokens <= limits.tokens

    def _share(self, tokens: int, requests: int) -> float:
        """Return the share of the limits that requests take; of a budget without any, their number."""
        limits = self.limits
        of_requests = requests / limits.requests if limits.requests else 0.0
        of_tokens = tokens / limits.tokens if limits.tokens else 0.0
        if limits.requests is None and limits.tokens is None:
            return float(requests)
        return of_requests + of_tokens
