"""Two gateways with certificates of a real authority: the requests they pass on, and the requests they refuse."""

import asyncio
import base64
import socket
import ssl
from collections.abc import Awaitable, Callable

import aiohttp
import pytest
from aiohttp import web

from lattice_server.engine.services.authority import Authority
from lattice_worker.gateway.identity import Identity
from lattice_worker.gateway.permits import Permits
from lattice_worker.gateway.proxy import Proxy
from lattice_worker.gateway.relay import Relay
from lattice_worker.gateway.routing import Routing
from lattice_worker.gateway.task import Gateway
from tests.worker.gateways import (
    BODY,
    SERVICE,
    Engine,
    Servers,
    Slow,
    breaking,
    busy,
    check_broken_stream,
    closed_port,
    echo,
    reset,
    run_in,
    until_waited_for,
)

NEAR, FAR = "gateway-near", "gateway-far"
AUTHORITY = Authority()


def identity(name: str, authority: Authority = AUTHORITY) -> Identity:
    made = Identity()
    certify(made, name, authority)
    return made


def certify(made: Identity, name: str, authority: Authority = AUTHORITY) -> None:
    """Give the identity of a gateway its certificate."""
    made.take(authority.sign(made.request, name), authority.certificate)


class Pair(Servers):
    """The gateway of a task's node, and that of the node with the instance `far-1`."""

    def __init__(self, lost_s: float = 3600.0) -> None:
        super().__init__()
        self.passed_by: list[tuple[str, str]] = []
        self.waits = 0
        self.near, self.far = Routing(), Routing()
        self.proxy = Proxy(self.near, self._service_of, self._wait, Permits(self.ask), lost_s=lost_s)
        self.proxy.to_gateways = identity(NEAR).context(is_server=False)
        self.relay = Relay(self.far, self._passed_on)

    async def _service_of(self, key: str) -> str | None:
        return SERVICE if key == "key" else None

    async def _passed_on(self, key: str, gateway: str) -> str | None:
        self.passed_by.append((key, gateway))
        return SERVICE if (key, gateway) == ("key", NEAR) else None

    async def _wait(self, service: str) -> None:
        self.waits += 1

    async def start(self, engine: Engine, name: str = FAR) -> str:
        """Start all; return the URL for tasks. `name` is the far gateway's name in it."""
        self.far.update(_routes(replicas={"far-1": await self.engine(engine)}))
        self.peer = await self.serve(self.relay.door.application(), identity(FAR).context(is_server=True))
        self.near.update(_routes(replicas={}, remote={"far-1": [self.peer, name]}))
        return f"http://{await self.serve(self.proxy.door.application())}/v1/chat/completions"


def _routes(**instances: object) -> dict[str, dict[str, object]]:
    return {SERVICE: {"model": "real", "key": "engine-key", **instances}}


def scenario(run: Callable[[Pair, aiohttp.ClientSession], Awaitable[None]]) -> None:
    run_in(Pair, run)


def test_request_passes_two_gateways_and_the_engine_gets_its_own_key() -> None:
    async def run(pair: Pair, client: aiohttp.ClientSession) -> None:
        url = await pair.start(echo)
        async with client.post(url, json=BODY) as answer:
            found = await answer.json()
        assert (answer.status, answer.headers["x-lattice-instance"]) == (200, "far-1")
        assert found == {"body": BODY | {"model": "real"}, "key": "Bearer engine-key"}
        assert pair.passed_by == [("key", NEAR)]

    scenario(run)


def test_stream_that_breaks_behind_the_other_gateway_ends_with_an_error() -> None:
    async def run(pair: Pair, client: aiohttp.ClientSession) -> None:
        await check_broken_stream(client, await pair.start(breaking))

    scenario(run)


@pytest.mark.parametrize("length", [None, 100])
def test_whole_answer_that_breaks_behind_the_other_gateway_is_not_taken_for_whole(length: int | None) -> None:
    async def run(pair: Pair, client: aiohttp.ClientSession) -> None:
        async def half(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"content-type": "application/json"})
            response.content_length = length
            await response.prepare(request)
            await response.write(b'{"choices": []}')
            await reset(request)
            return response

        url = await pair.start(half)
        async with client.post(url, json=BODY) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (503, "replica_lost")

    run_in(lambda: Pair(lost_s=0.1), run)


@pytest.mark.parametrize(("engine", "calls"), [(busy, 1), (reset, 1), (None, 0)])
def test_request_waits_for_other_routes_unless_the_instance_there_answered(engine: Engine | None, calls: int) -> None:
    async def run(pair: Pair, client: aiohttp.ClientSession) -> None:
        called = 0

        async def counted(request: web.Request) -> web.StreamResponse:
            nonlocal called
            called += 1
            assert engine is not None
            return await engine(request)

        url = await pair.start(counted)
        if engine is None:
            pair.far.update(_routes(replicas={"far-1": closed_port()}))
        news = pair.near.news
        asking = asyncio.create_task(client.post(url, json=BODY))
        if engine is not busy:
            await until_waited_for(news)
            pair.near.update(_routes(replicas={"near-1": await pair.engine(echo)}))
        answer = await asking
        assert (answer.status, called) == (503 if engine is busy else 200, calls)

    scenario(run)


@pytest.mark.parametrize("who", ["caller", "key here", "key there"])
def test_engine_stops_when_the_caller_leaves_or_its_key_ends_at_either_gateway(who: str) -> None:
    async def run(pair: Pair, client: aiohttp.ClientSession) -> None:
        slow = Slow()
        asking = asyncio.create_task(client.post(await pair.start(slow), json=BODY))
        await slow.begun.wait()
        match who:
            case "caller":
                asking.cancel()
            case "key here":
                pair.proxy.door.end_requests("key")
            case _:
                pair.relay.door.end_requests("key")
        await slow.ended.wait()
        await asyncio.gather(asking, return_exceptions=True)

    scenario(run)


def test_gateway_is_not_called_when_it_has_the_name_of_another_one() -> None:
    async def run(pair: Pair, client: aiohttp.ClientSession) -> None:
        url = await pair.start(echo, "gateway-of-yesterday")
        async with client.post(url, json=BODY) as answer:
            text = (await answer.json())["error"]["message"]
        assert answer.status == 503
        assert "certificate" in text.lower()
        assert pair.passed_by == []

    run_in(lambda: Pair(lost_s=0.1), run)


async def _status(url: str, context: ssl.SSLContext | bool, key: str = "key", instance: str = "far-1") -> int:
    headers = {"authorization": f"Bearer {key}", "x-lattice-instance": instance}
    async with (
        aiohttp.ClientSession() as client,
        client.post(url, json=BODY, headers=headers, ssl=context, server_hostname=FAR) as answer,
    ):
        return answer.status


def test_gateway_refuses_requests_without_certificate_and_key_of_their_node() -> None:
    async def run(pair: Pair, _: aiohttp.ClientSession) -> None:
        await pair.start(echo)
        url = f"https://{pair.peer}/v1/chat/completions"
        assert await _status(url, pair.proxy.to_gateways or True) == 200
        # The key of an attempt on another node, a key that was guessed, an instance that is not here.
        assert await _status(url, identity("gateway-third").context(is_server=False)) == 401
        assert await _status(url, pair.proxy.to_gateways or True, key="guessed") == 401
        assert await _status(url, pair.proxy.to_gateways or True, key="") == 401
        assert await _status(url, pair.proxy.to_gateways or True, instance="far-2") == 503
        asked = len(pair.passed_by)
        stranger = identity(NEAR, Authority()).context(is_server=False)
        stranger.load_verify_locations(cadata=AUTHORITY.certificate)
        anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        anonymous.load_verify_locations(cadata=AUTHORITY.certificate)
        for context in (stranger, anonymous):
            with pytest.raises(aiohttp.ClientError):
                await _status(url, context)
        with pytest.raises(aiohttp.ClientError):
            await _status(url.replace("https", "http"), True)
        assert len(pair.passed_by) == asked

    scenario(run)


def test_gateway_takes_no_requests_of_other_nodes_when_its_port_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> str:
        gateway = Gateway()
        certify(gateway._identity, NEAR)
        runner = web.AppRunner(web.Application())
        await runner.setup()
        try:
            return await gateway._listen_to_gateways(runner, "127.0.0.1")
        finally:
            await runner.cleanup()

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("LATTICE_GATEWAY_PORT", str(port))
        assert asyncio.run(run()) == ""
    assert asyncio.run(run()) == f"127.0.0.1:{port}"


def test_authority_signs_no_text_that_is_not_a_request_signed_by_its_key() -> None:
    lines = Identity().request.splitlines()
    content = bytearray(base64.b64decode("".join(lines[1:-1])))
    content[-1] ^= 1  # Of the signature.
    forged = "\n".join([lines[0], base64.b64encode(content).decode(), lines[-1]])
    for wrong in ("", "x", forged):
        with pytest.raises(ValueError, match="request"):
            AUTHORITY.sign(wrong, NEAR)
