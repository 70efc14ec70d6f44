"""Budgets of models: no window has more than its limit however a provider counts, and tenants have equal shares."""

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lattice_server.core.services.budgets import Budget, Left, Limits, Request
from tests.examples import share

WINDOW_S = 60.0


def request(name: str, tenant: str = "", tokens: int = 0, holder: str = "g") -> Request:
    return Request(name, tenant, holder, tokens)


def names(permitted: list[Request]) -> list[str]:
    return [one.name for one in permitted]


def ask_all(budget: Budget, *requests: Request, now: float = 0.0) -> list[str]:
    found = [name for one in requests for name in names(budget.ask(one, now))]
    budget.check()
    return found


def test_requests_wait_until_a_window_after_the_first_byte_of_earlier_ones() -> None:
    budget = Budget(Limits(requests_per_minute=2))
    assert ask_all(budget, request("a"), request("b"), request("c")) == ["a", "b"]
    assert budget.next_deadline(0.0) is None  # It depends on when an answer comes.
    budget.answered("a", 5.0, 5.0)
    assert budget.end("a", 9.0) == []
    assert budget.next_deadline(9.0) == 65.0
    assert budget.tick(64.9) == []
    assert names(budget.tick(65.0)) == ["c"]
    budget.check()


def test_tokens_are_replaced_by_those_that_were_used() -> None:
    budget = Budget(Limits(tokens_per_minute=100))
    assert ask_all(budget, request("a", tokens=80), request("b", tokens=50)) == ["a"]
    assert names(budget.end("a", 1.0, tokens=30)) == ["b"]
    assert (budget.use(1.0).tokens, budget.use(1.0).requests) == (80, 2)
    budget.end("b", 2.0, tokens=90)  # More than was estimated.
    assert budget.use(2.0).tokens == 120
    assert ask_all(budget, request("c", tokens=1), now=3.0) == []
    assert names(budget.tick(61.0)) == ["c"]
    assert Limits(tokens_per_minute=100).refusal(101)
    assert not Limits(tokens_per_minute=100).refusal(100)


def test_small_request_does_not_pass_a_large_one() -> None:
    budget = Budget(Limits(tokens_per_minute=100))
    assert ask_all(budget, *[request(n, tokens=t) for n, t in (("a", 60), ("large", 50), ("small", 1))]) == ["a"]
    assert names(budget.end("a", 1.0, tokens=10)) == ["large", "small"]


def test_requests_at_once_are_limited_and_waiting_ones_can_be_withdrawn() -> None:
    budget = Budget(Limits(concurrency=1))
    assert ask_all(budget, request("a"), request("b"), request("c")) == ["a"]
    budget.end("b", 1.0)
    assert names(budget.end("a", 1.0)) == ["c"]
    assert budget.end("a", 2.0) == []  # A late report changes nothing.
    assert budget.use(2.0).open == 1


def test_refusal_of_a_provider_stops_all_and_the_request_goes_first_again() -> None:
    budget = Budget(Limits(requests_per_minute=10))
    assert ask_all(budget, request("a")) == ["a"]
    budget.refuse("a", 5.0, 1.0)
    assert ask_all(budget, request("b"), now=2.0) == []
    assert budget.ask(request("a2"), 2.0, is_again=True) == []
    assert (budget.next_deadline(2.0), budget.use(2.0).blocked_s, budget.use(2.0).refused) == (6.0, 4.0, 1)
    assert names(budget.tick(6.0)) == ["a2", "b"]


def test_refusals_without_a_time_wait_longer_each_time_until_an_answer_comes() -> None:
    budget = Budget(Limits(requests_per_minute=1000))
    now, waits = 0.0, []
    for number in range(8):
        budget.ask(request(str(number)), now)
        budget.refuse(str(number), None, now)
        waits.append(budget.use(now).blocked_s)
        now += waits[-1]
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    budget.ask(request("x"), now)
    budget.answered("x", now, now)
    budget.refuse("x", None, now)
    assert budget.use(now).blocked_s == 1.0


def test_lost_gateway_has_its_requests_counted_for_a_window_and_its_queue_dropped() -> None:
    budget = Budget(Limits(requests_per_minute=2, concurrency=1))
    requests = request("a", holder="x"), request("b", holder="x"), request("c", holder="y")
    assert ask_all(budget, *requests) == ["a"]
    assert names(budget.lose("x", 3.0)) == ["c"]
    assert ask_all(budget, request("d", holder="y"), now=4.0) == []
    budget.end("c", 5.0)
    assert names(budget.tick(63.0)) == ["d"]


def test_windows_and_shared_limits() -> None:
    one = Limits(600, 6000, None, 1.0)
    assert (one.requests, one.tokens) == (10, 100)
    assert one.narrowed(Limits(60, None, 3)) == Limits(60, 6000, 3, 1.0)
    assert Limits(1, window_s=1.0).requests == 1


@settings(max_examples=share(500), deadline=None)
@given(st.lists(st.tuples(st.sampled_from("xy"), st.integers(1, 60)), min_size=20, max_size=80), st.integers(60, 120))
def test_tenants_that_wait_have_equal_shares(asked: list[tuple[str, int]], limit: int) -> None:
    budget = Budget(Limits(tokens_per_minute=limit))
    for number, (tenant, tokens) in enumerate(asked):
        budget.ask(request(str(number), tenant, tokens), 0.0)
    used: Counter[str] = Counter()
    left = Counter(tenant for tenant, _ in asked)
    now, permitted = 0.0, []
    for one in list(budget._requests.values()):
        permitted.append(one)
    while permitted:
        for one in permitted:
            used[one.tenant] += one.tokens
            left[one.tenant] -= 1
            if all(left.values()):
                # The first ones were permitted before the other tenant asked.
                assert abs(used["x"] - used["y"]) <= 60 + limit
        for one in permitted:
            budget.end(one.name, now)
        deadline = budget.next_deadline(now)
        permitted = []
        while deadline is not None and not permitted:
            now = deadline
            permitted = budget.tick(now)
            deadline = budget.next_deadline(now)
        budget.check()
    assert not any(left.values()), "all were permitted"


# Providers that count in different ways; each says whether it takes a request at a time.


class Sliding:
    def __init__(self, limit: int) -> None:
        self.limit, self.times = limit, deque[float]()

    def takes(self, at: float) -> bool:
        while self.times and self.times[0] <= at - WINDOW_S:
            self.times.popleft()
        if len(self.times) >= self.limit:
            return False
        self.times.append(at)
        return True


class Fixed:
    def __init__(self, limit: int) -> None:
        self.limit, self.counts = limit, Counter[int]()

    def takes(self, at: float) -> bool:
        self.counts[int(at // WINDOW_S)] += 1
        return self.counts[int(at // WINDOW_S)] <= self.limit


class Bucket:
    def __init__(self, limit: int) -> None:
        self.limit, self.level, self.at = limit, float(limit), 0.0

    def takes(self, at: float) -> bool:
        self.level = min(self.limit, self.level + (at - self.at) * self.limit / WINDOW_S)
        self.at = at
        if self.level < 1.0 - 1e-6:
            return False
        self.level -= 1.0
        return True


@pytest.mark.parametrize("provider", [Sliding, Fixed, Bucket])
@settings(max_examples=share(300), deadline=None)
@given(seed=st.integers(0, 1 << 30), latency_s=st.sampled_from([0.1, 2.0, 5.0]))
def test_no_provider_refuses_a_request_and_nearly_all_of_its_limit_is_used(
    provider: Callable[[int], Any], seed: int, latency_s: float
) -> None:
    limit, wanted = 60, 300
    counting, chance = provider(limit), random.Random(seed)
    budget = Budget(Limits(requests_per_minute=limit))
    events: list[tuple[float, int, str, str]] = []
    numbers = iter(range(1 << 30))

    def send(permitted: list[Request], now: float) -> None:
        for one in permitted:
            there = now + chance.uniform(0, latency_s)
            heapq.heappush(events, (there, next(numbers), "there", one.name))

    for number in range(wanted):
        send(budget.ask(request(str(number)), 0.0), 0.0)
    now = ended = 0.0
    while True:
        deadline = budget.next_deadline(now)
        at = events[0][0] if events else float("inf")
        if deadline is not None and deadline <= at:
            now = deadline
            send(budget.tick(now), now)
            continue
        if not events:
            break
        now, _, what, name = heapq.heappop(events)
        if what == "there":
            assert counting.takes(now), f"refused at {now}"
            heapq.heappush(events, (now + chance.uniform(0, latency_s), next(numbers), "back", name))
        else:
            ended = now
            budget.answered(name, now, now)
            send(budget.end(name, now), now)
    assert budget.permitted == wanted
    # All but the last window of requests take a window each, and the time of an answer.
    assert ended <= (wanted / limit - 1) * (WINDOW_S + 2 * latency_s) + 2 * latency_s


def test_use_of_a_key_elsewhere_is_held_until_its_provider_is_free_again() -> None:
    budget = Budget(Limits(requests_per_minute=10, tokens_per_minute=100))
    assert ask_all(budget, request("a", tokens=10)) == ["a"]
    budget.answered("a", 1.0, 1.0)
    # Of 10 requests the provider has counted 8, one of which is ours; of 100 tokens 50, 10 of which are ours.
    assert budget.told(Left(2, 30.0), Left(50, 20.0), 1.0) == []
    assert ask_all(budget, *(request(name, tokens=20) for name in "bcde"), now=2.0) == ["b", "c"]
    assert budget.next_deadline(2.0) == 21.0
    assert budget.tick(30.9) == []
    assert names(budget.tick(31.0)) == ["d", "e"]
    # A reset of a day is held for a window, and a limit that there is not is not held.
    budget = Budget(Limits(requests_per_minute=10))
    budget.told(Left(0, 86400.0), Left(0, 86400.0), 0.0)
    assert ask_all(budget, request("f")) == []
    assert budget.next_deadline(0.0) == 60.0
    # An answer that was counted before others were tells less.
    assert budget.told(Left(8, 70.0), None, 1.0) == []
    assert names(budget.tick(60.0)) == ["f"]
    assert ask_all(budget, *(request(str(number)) for number in range(9)), now=60.5) == [*"0123456"]
    assert names(budget.tick(61.0)) == ["7", "8"]


@given(
    limit=st.integers(1, 20),
    others=st.integers(0, 20),
    known=st.integers(0, 20),
    reset_s=st.floats(0.5, 59),
)
def test_no_more_is_permitted_before_the_reset_than_a_provider_says_is_left(
    limit: int, others: int, known: int, reset_s: float
) -> None:
    budget, others = Budget(Limits(requests_per_minute=limit)), min(others, limit)
    ours = ask_all(budget, *(request(f"a{number}") for number in range(min(known, limit - others))))
    for name in ours:
        budget.answered(name, 0.0, 0.0)
        budget.end(name, 0.0)
    left = limit - others - len(ours)
    budget.told(Left(left, reset_s), None, 0.0)
    later = ask_all(budget, *(request(f"b{number}") for number in range(2 * limit)), now=reset_s / 2)
    assert len(later) == left
    assert len(names(budget.tick(reset_s))) == others


@given(
    st.integers(1, 10), st.lists(st.tuples(st.sampled_from(["ask", "answer", "end"]), st.integers(0, 20)), max_size=40)
)
def test_counts_of_a_provider_do_not_delay_the_only_user_of_a_key(limit: int, steps: list[tuple[str, int]]) -> None:
    """The provider counts a request at some time from its permit to its first byte: of those in flight, any number."""
    plain, told = (Budget(Limits(requests_per_minute=limit)) for _ in range(2))
    now, number, flying, answered = 0.0, 0, list[str](), list[str]()
    for what, amount in steps:
        now += 1.0
        if what == "ask":
            number += 1
            found = [ask_all(budget, request(str(number)), now=now) for budget in (plain, told)]
        elif what == "answer" and flying:
            answered.append(flying.pop(0))
            found = [names(budget.answered(answered[-1], now, now)) for budget in (plain, told)]
            counted = min(limit, len(answered) + min(amount, len(flying)))
            found[1] += names(told.told(Left(limit - counted, 60.0), None, now))
        elif what == "end" and answered:
            found = [names(budget.end(answered[-1], now)) for budget in (plain, told)]
        else:
            continue
        assert found[0] == found[1]
        flying += found[0]
        told.check()


class Histories(RuleBasedStateMachine):
    """Reports of gateways in any order, sensible or not."""

    @initialize(
        requests=st.none() | st.integers(1, 5),
        tokens=st.none() | st.integers(1, 40),
        most=st.none() | st.integers(1, 3),
    )
    def begin(self, requests: int | None, tokens: int | None, most: int | None) -> None:
        self.limits = Limits(requests, tokens, most)
        self.budget, self.now, self.number = Budget(self.limits), 0.0, 0
        self.open: dict[str, Request] = {}
        self.asked: list[str] = []
        self.blocked_until = 0.0

    def take(self, permitted: list[Request]) -> None:
        assert not permitted or self.now >= self.blocked_until, "permitted while the provider wants none"
        for one in permitted:
            assert one.name not in self.open, "permitted twice"
            self.open[one.name] = one

    @rule(tenant=st.sampled_from("xyz"), tokens=st.integers(0, 40), holder=st.sampled_from("gh"), again=st.booleans())
    def ask(self, tenant: str, tokens: int, holder: str, again: bool) -> None:
        if self.limits.refusal(tokens):
            return
        self.number += 1
        self.asked.append(str(self.number))
        self.take(self.budget.ask(request(str(self.number), tenant, tokens, holder), self.now, is_again=again))

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), tokens=st.none() | st.integers(0, 60))
    def end(self, data: st.DataObject, tokens: int | None) -> None:
        name = data.draw(st.sampled_from(self.asked))
        self.open.pop(name, None)
        self.take(self.budget.end(name, self.now, tokens=tokens))

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def answered(self, data: st.DataObject) -> None:
        self.take(self.budget.answered(data.draw(st.sampled_from(self.asked)), self.now, self.now))

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), wait=st.none() | st.floats(0, 100))
    def refuse(self, data: st.DataObject, wait: float | None) -> None:
        name = data.draw(st.sampled_from(self.asked))
        self.open.pop(name, None)
        permitted = self.budget.refuse(name, wait, self.now)
        self.blocked_until = max(self.blocked_until, self.now + self.budget.use(self.now).blocked_s)
        self.take(permitted)

    @rule(left=st.integers(0, 5), tokens=st.integers(0, 40), reset_s=st.floats(0, 100))
    def told(self, left: int, tokens: int, reset_s: float) -> None:
        self.take(self.budget.told(Left(left, reset_s), Left(tokens, reset_s), self.now))

    @rule(holder=st.sampled_from("gh"))
    def lose(self, holder: str) -> None:
        self.open = {name: one for name, one in self.open.items() if one.holder != holder}
        self.take(self.budget.lose(holder, self.now))

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.budget.tick(self.now))

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "budget"):
            return
        self.budget.check()
        use, limits = self.budget.use(self.now), self.limits
        assert set(self.budget._requests) == set(self.open)
        assert limits.requests is None or use.requests <= limits.requests
        assert limits.concurrency is None or use.open <= limits.concurrency
        assert self.budget.tick(self.now) == [], "one that fits was not permitted at once"

    def teardown(self) -> None:
        if not hasattr(self, "budget"):
            return
        for _ in range(10 * self.number + 10):
            for name in list(self.open):
                del self.open[name]
                self.take(self.budget.end(name, self.now))
            if (deadline := self.budget.next_deadline(self.now)) is not None:
                self.now = deadline
                self.take(self.budget.tick(self.now))
            elif not self.open:
                break
        assert self.budget.use(self.now).waiting == 0, "some wait for ever"
        self.now += 1000.0
        self.budget.tick(self.now)
        assert (self.budget.use(self.now).requests, self.budget.use(self.now).tokens) == (0, 0)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=share(1000), stateful_step_count=40, deadline=None)
