"""Owns the budgets of models, and tells gateways of them, on the main thread.

A gateway reports by a question that is answered at once: the requests that it would make, the requests whose
answer has begun, and the requests that have ended. Another question is answered with the requests that it may make.

Rule: models of one provider with the same URL, model and key share a budget; it is forgotten once nothing counts.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lattice_server.core.messages import AnswerQuestion, QuestionAsked
from lattice_server.core.services.budgets import Budget, Left, Limits, Request
from lattice_server.core.services.model import ServiceSpec
from lattice_server.core.tenancy import SEPARATOR, key_of
from lattice_server.engine.services import answers
from lattice_server.engine.services.entry import ServiceEntry

Key = tuple[str, ...]


@dataclass(slots=True, eq=False)
class Gateway:
    """The requests that one gateway may make and was not told of yet. `question` is open if it waits for some."""

    question: QuestionAsked | None = None
    permitted: list[str] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Shared:
    """A budget, and the timer of its machine."""

    budget: Budget
    timer: asyncio.TimerHandle | None = None


class Budgets:
    """The budgets by key. `answer` sends the answer of a question."""

    def __init__(self, answer: Callable[[AnswerQuestion], None]) -> None:
        self._answer = answer
        self._shared: dict[Key, Shared] = {}
        self._of_service: dict[str, Key] = {}
        self._gateways: dict[str, Gateway] = {}  # By the key of their run.
        self._of_request: dict[str, Key] = {}

    def define(self, entries: Iterable[ServiceEntry]) -> None:
        """Take the definitions of all models."""
        now = time.monotonic()
        limits: dict[Key, Limits] = {}
        self._of_service = {}
        for entry in entries:
            spec = entry.machine.spec
            entry.budget = None
            if spec.budget is not None:
                service = key_of(entry.name, entry.tenant)
                key = self._of_service[service] = _key(spec, service)
                limits[key] = limits[key].narrowed(spec.budget) if key in limits else spec.budget
                entry.budget = self._shared.setdefault(key, Shared(Budget(spec.budget))).budget
        for key, shared in list(self._shared.items()):
            if key in limits:
                self._tell(key, shared.budget.limit(limits[key], now))
            elif not shared.budget.use(now).requests:
                if shared.timer is not None:
                    shared.timer.cancel()
                del self._shared[key]

    def report(self, question: QuestionAsked) -> None:
        """Take a report of a gateway, and answer which of its requests are refused, with the reasons."""
        content, now, run = answers.content_of(question), time.monotonic(), question.run_id
        refused: dict[str, str] = {}
        for name, ago_s in content.get("answered", ()):
            if (found := self._find(run, name)) is not None:
                key, budget, full = found
                self._tell(key, budget.answered(full, now - float(ago_s), now))
        for name, told in content.get("told", ()):
            if (found := self._find(run, name)) is not None:
                key, budget, _ = found
                self._tell(key, budget.told(_left(told.get("requests")), _left(told.get("tokens")), now))
        for name, tokens in content.get("ended", ()):
            if (found := self._find(run, name, is_last=True)) is not None:
                key, budget, full = found
                self._tell(key, budget.end(full, now, tokens=tokens))
        for name, after_s in content.get("refused", ()):
            if (found := self._find(run, name, is_last=True)) is not None:
                key, budget, full = found
                self._tell(key, budget.refuse(full, after_s, now))
        # Last: a request that was refused is made again, and has to wait for the time that came with the refusal.
        for name, service, tokens, is_again in content.get("asked", ()):
            self._ask(run, str(name), str(service), int(tokens), bool(is_again), refused)
        self._answer(answers.answered(question, {"refused": refused}))

    def wait(self, question: QuestionAsked) -> None:
        """Take the question of a gateway for permitted requests."""
        gateway = self._gateways.setdefault(question.run_id, Gateway())
        gateway.question = question
        self._send(gateway)

    def lose(self, run: str) -> None:
        """End all requests of a gateway that is gone."""
        self._gateways.pop(run, None)
        prefix = f"{run}{SEPARATOR}"
        self._of_request = {name: key for name, key in self._of_request.items() if not name.startswith(prefix)}
        for key, shared in list(self._shared.items()):
            self._tell(key, shared.budget.lose(run, time.monotonic()))

    def _ask(self, run: str, name: str, service: str, tokens: int, is_again: bool, refused: dict[str, str]) -> None:
        key = self._of_service.get(service)
        if key is None:  # The model has no budget any more.
            self._permit(run, name)
            return
        budget = self._shared[key].budget
        if why := budget.limits.refusal(tokens):
            refused[name] = why
            return
        full = f"{run}{SEPARATOR}{name}"
        self._of_request[full] = key
        tenant = service.partition(SEPARATOR)[2]
        permitted = budget.ask(Request(full, tenant, run, tokens), time.monotonic(), is_again=is_again)
        self._tell(key, permitted)

    def _find(self, run: str, name: str, *, is_last: bool = False) -> tuple[Key, Budget, str] | None:
        """Return the budget of a request and the name of the request there; with `is_last` the request is forgotten."""
        full = f"{run}{SEPARATOR}{name}"
        key = self._of_request.pop(full, None) if is_last else self._of_request.get(full)
        return None if key is None or key not in self._shared else (key, self._shared[key].budget, full)

    def _tell(self, key: Key, permitted: Iterable[Request]) -> None:
        for request in permitted:
            self._permit(request.holder, request.name.rpartition(SEPARATOR)[2])
        shared, now = self._shared[key], time.monotonic()
        if shared.timer is not None:
            shared.timer.cancel()
            shared.timer = None
        if (deadline := shared.budget.next_deadline(now)) is not None:
            tick = partial(self._tick, key)
            shared.timer = asyncio.get_running_loop().call_later(max(0.0, deadline - now), tick)

    def _tick(self, key: Key) -> None:
        shared = self._shared[key]
        shared.timer = None
        self._tell(key, shared.budget.tick(time.monotonic()))

    def _permit(self, run: str, name: str) -> None:
        gateway = self._gateways.setdefault(run, Gateway())
        gateway.permitted.append(name)
        self._send(gateway)

    def _send(self, gateway: Gateway) -> None:
        if gateway.question is not None and gateway.permitted:
            question, gateway.question = gateway.question, None
            permitted, gateway.permitted = gateway.permitted, []
            self._answer(answers.answered(question, {"permitted": permitted}))


def _left(told: list[float] | None) -> Left | None:
    return None if told is None else Left(int(told[0]), float(told[1]))


def of_route(spec: ServiceSpec) -> Mapping[str, Any]:
    """Return the facts about the budget of a model that a gateway needs."""
    return {"has_budget": spec.budget is not None, "tokens": None if spec.budget is None else spec.budget.tokens}


def _key(spec: ServiceSpec, service: str) -> Key:
    return (spec.base_url, spec.model, spec.api_key) if spec.base_url else (service,)
