"""Requests to models whose instances are lost: another one, or the wait for the news of the loss, or a refusal."""

import asyncio
import json
import selectors
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from lattice_worker.gateway.permits import Permits
from lattice_worker.gateway.proxy import Proxy
from lattice_worker.gateway.refusals import Refusal
from lattice_worker.gateway.routing import Routing, Target
from lattice_worker.gateway.sent import Sent
from lattice_worker.gateway.tries import MAX_SENT, ElsewhereError
from tests.worker.gateways import (
    BODY,
    SERVICE,
    Engine,
    Servers,
    busy,
    closed_port,
    echo,
    reset,
    run_in,
    until_waited_for,
)

LOST_S = 0.02
# The behaviour of an instance: `refuses` answers with 503, `breaks` closes the connection, `gone` has no port.
FAULTS = ("answers", "refuses", "breaks", "gone")


class Selector(selectors.DefaultSelector):
    """Waits for no file: it lets the time pass at once to which it was to wait."""

    passed_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return the files that are ready."""
        self.passed_s += timeout or 0.0
        return super().select(0.0)


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time passes only while all tasks wait, however slow the machine is."""

    def __init__(self) -> None:
        self._clock = Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        """Return the time."""
        return self._clock.passed_s


class Scripted(Proxy):
    """A gateway whose instances follow a script; `met` counts their requests by fault."""

    def __init__(self, faults: Mapping[str, str], routing: Routing) -> None:
        super().__init__(routing, self._nothing, self._cold_start, Permits(self._nothing), lost_s=LOST_S)
        self.faults, self.met = faults, Counter[str]()
        self.has_more_routes = True

    async def _nothing(self, *_: object) -> None:
        raise AssertionError("this is not asked")

    async def _cold_start(self, _: str) -> None:
        while not self._routing.targets(SERVICE):
            if not self.has_more_routes:
                raise Refusal(503, "model_failed", "it cannot start")
            await self._routing.news.wait()

    async def _try(self, request: web.Request, service: str, sent: Sent, target: Target) -> web.StreamResponse:
        await asyncio.sleep(0)
        fault = self.faults[target.instance_id]
        self.met[fault] += 1
        if fault == "answers":
            return web.Response()
        raise ElsewhereError(fault, is_lost=fault != "refuses", was_sent=fault != "gone")


@given(
    faults=st.fixed_dictionaries({name: st.sampled_from(FAULTS) for name in "abcde"}),
    script=st.lists(st.tuples(st.sets(st.sampled_from("abcde")), st.integers(0, 4)), min_size=1, max_size=5),
)
def test_request_is_refused_only_after_an_instance_refused_it_or_a_bound_passed(
    faults: Mapping[str, str], script: Sequence[tuple[set[str], int]]
) -> None:
    async def run() -> None:
        routing = Routing()
        proxy = Scripted(faults, routing)
        code = ""

        async def change_routes() -> None:
            for number, (names, steps) in enumerate(script, 1):
                proxy.has_more_routes = number < len(script)
                replicas = {name: f"h:{ord(name)}" for name in sorted(names)}
                routing.update({SERVICE: {"model": "", "key": "", "replicas": replicas}})
                for _ in range(steps):
                    await asyncio.sleep(0)

        changing = asyncio.create_task(change_routes())
        try:
            await proxy._pass(None, SERVICE, Sent({}))  # type: ignore[arg-type]
        except Refusal as refusal:
            code = refusal.code
        passed_s = asyncio.get_running_loop().time()
        await changing
        sent = proxy.met["refuses"] + proxy.met["breaks"]
        assert sent <= MAX_SENT
        assert bool(proxy.met["answers"]) is not bool(code)
        if code == "replica_lost":
            assert proxy.met["refuses"] or sent == MAX_SENT or passed_s >= LOST_S
        listed = {faults[name] for name in script[-1][0]}
        if "answers" in listed and sent < MAX_SENT:
            assert not code or proxy.met["refuses"]

    with asyncio.Runner(loop_factory=Clock) as runner:
        runner.run(run())


class Losing(Servers):
    """A gateway before instances that are lost."""

    def __init__(self) -> None:
        super().__init__()
        self.routing = Routing()
        self.cold_starts = 0
        self.proxy = Proxy(self.routing, self._service_of, self._wait, Permits(self.ask))

    async def _service_of(self, _: str) -> str:
        return SERVICE

    async def _wait(self, _: str) -> None:
        self.cold_starts += 1
        while not self.routing.targets(SERVICE):
            await self.routing.news.wait()

    def list(self, **replicas: str) -> None:
        """Have these instances take requests."""
        self.routing.update({SERVICE: {"model": "", "key": "", "replicas": replicas}})

    async def ask_for(self, client: aiohttp.ClientSession) -> "asyncio.Task[tuple[int, str]]":
        """Begin a request; return it. Its result has the status, and the instance or the code of the refusal."""
        url = f"http://{await self.serve(self.proxy.door.application())}/v1/chat/completions"

        async def asked() -> tuple[int, str]:
            async with client.post(url, json=BODY) as answer:
                whole = json.loads(await answer.read())
                return answer.status, answer.headers.get("x-lattice-instance") or whole["error"]["code"]

        return asyncio.create_task(asked())

    async def until_waiting(self) -> None:
        """Wait until a request waits for other routes."""
        await until_waited_for(self.routing.news)


def scenario(run: Callable[[Losing, aiohttp.ClientSession], Awaitable[None]]) -> None:
    run_in(Losing, run)


async def _lost(world: Losing, how: str) -> str:
    return await world.engine(reset) if how == "broken" else closed_port()


@pytest.mark.parametrize("how", ["broken", "refused"])
def test_request_waits_for_the_next_instance_when_the_only_one_is_lost(how: str) -> None:
    async def run(world: Losing, client: aiohttp.ClientSession) -> None:
        world.list(one=await _lost(world, how))
        asking = await world.ask_for(client)
        await world.until_waiting()
        world.list()  # The loss is known.
        await world.until_waiting()
        world.list(two=await world.engine(echo))
        assert await asking == (200, "two")
        assert world.cold_starts == 1

    scenario(run)


def test_new_instance_answers_before_the_loss_of_another_is_known() -> None:
    async def run(world: Losing, client: aiohttp.ClientSession) -> None:
        lost = closed_port()
        world.list(one=lost)
        asking = await world.ask_for(client)
        await world.until_waiting()
        world.list(one=lost, two=await world.engine(echo))
        assert await asking == (200, "two")
        assert world.cold_starts == 0

    scenario(run)


def test_request_is_refused_when_the_loss_of_its_instance_is_not_known_in_time() -> None:
    async def run(world: Losing, client: aiohttp.ClientSession) -> None:
        world.proxy._lost_s = LOST_S
        world.list(one=closed_port())
        assert await (await world.ask_for(client)) == (503, "replica_lost")
        assert world.cold_starts == 0

    scenario(run)


def test_lost_instances_are_no_tries_so_that_one_of_many_that_is_left_answers() -> None:
    async def run(world: Losing, client: aiohttp.ClientSession) -> None:
        lost = {f"lost-{number}": closed_port() for number in range(2 * MAX_SENT)}
        world.list(**lost, left=await world.engine(echo))
        assert await (await world.ask_for(client)) == (200, "left")

    scenario(run)


@pytest.mark.parametrize("engine", [busy, reset])
def test_request_is_not_passed_to_more_instances_than_it_may_end(engine: Engine) -> None:
    async def run(world: Losing, client: aiohttp.ClientSession) -> None:
        calls = Counter[str]()

        def counted(name: str) -> Engine:
            async def handle(request: web.Request) -> web.StreamResponse:
                calls[name] += 1
                return await engine(request)

            return handle

        world.list(**{name: await world.engine(counted(name)) for name in "abcde"})
        assert await (await world.ask_for(client)) == (503, "replica_lost")
        assert (calls.total(), max(calls.values())) == (MAX_SENT, 1)

    scenario(run)


def test_provider_that_does_not_answer_is_not_waited_for() -> None:
    async def run(world: Losing, client: aiohttp.ClientSession) -> None:
        world.list(gpt=f"http://{closed_port()}/v1")
        assert await (await world.ask_for(client)) == (503, "replica_lost")

    scenario(run)
