"""The parts of a gateway: whole answers, the choice of an instance, and the requests that it passes on."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from lattice_worker.gateway.limits import seconds, told_limits
from lattice_worker.gateway.permits import Permits
from lattice_worker.gateway.proxy import Proxy
from lattice_worker.gateway.refusals import Refusal, is_limit, retry_after_s
from lattice_worker.gateway.routing import Routing, Target
from lattice_worker.gateway.stream import Watch
from lattice_worker.gateway.usage import Estimates, Usage

SERVICE = "tiny\ntenant"


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def word(text: str, reason: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": reason}])


@given(st.lists(st.text(max_size=20), max_size=5), st.sampled_from(["stop", "length", "abort", None]), st.data())
def test_stream_is_complete_by_its_reason_however_it_is_split(
    words: list[str], reason: str | None, data: st.DataObject
) -> None:
    whole = [word(text) for text in words] + ([word("", reason)] if reason else []) + [b"data: [DONE]\n\n"]
    sent = b"".join(whole)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=6)))
    watch, passed = Watch(), b""
    for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
        passed += b"".join(watch.feed(sent[start:end]))
    assert watch.is_complete is (reason in {"stop", "length"})
    assert watch.is_aborted is (reason == "abort")
    expected = sent if reason != "abort" else b"".join(word(text) for text in words)
    assert passed == expected


@pytest.mark.parametrize(
    ("sent", "is_complete"),
    [
        (event(type="response.output_text.delta", delta="x"), False),
        (event(type="response.completed"), True),
        (event(error={"message": "too long"}), True),
        (b": waiting\n\n", False),
        (b"data: [DONE]\n\n", False),
        (b"data: [1]\n\n", False),
        (event(choices=None), False),
    ],
)
def test_stream_of_other_forms_is_complete_when_it_says_so(sent: bytes, is_complete: bool) -> None:
    watch = Watch()
    assert b"".join(watch.feed(sent)) == sent
    assert watch.is_complete is is_complete


def chosen(routing: Routing, without: Sequence[str] = ()) -> str:
    found = routing.choose(SERVICE, without)
    assert found is not None
    return found.instance_id


def test_routing_chooses_the_instance_with_the_fewest_requests_and_of_equal_ones_that_of_its_node() -> None:
    routing = Routing()
    assert routing.choose(SERVICE) is None
    route = {"model": "m", "key": "", "replicas": {"a": "h:1"}, "remote": {"b": ["h:2", "gateway-2"]}}
    routing.update({SERVICE: route})
    assert routing.choose(SERVICE) == Target("a", "h:1")
    routing.begin("a")
    assert routing.choose(SERVICE) == Target("b", "h:2", "gateway-2")
    routing.begin("b")
    assert chosen(routing) == "a"
    routing.begin("b")
    assert chosen(routing) == "a"
    assert chosen(routing, ["a"]) == "b"
    assert routing.choose(SERVICE, ["a", "b"]) is None
    routing.end("b")
    routing.end("b")
    assert chosen(routing) == "b"


Engine = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def _listening(handle: Engine) -> tuple[web.AppRunner, str]:
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", handle)
    return await _served(application)


async def _served(application: web.Application) -> tuple[web.AppRunner, str]:
    runner = web.AppRunner(application, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    return runner, f"{host}:{port}"


class World:
    """A gateway before some engines; `waits` counts the requests that wait for an instance."""

    def __init__(self) -> None:
        self.routing = Routing()
        self.waits = 0
        self.allowed = {"key": SERVICE}
        self.noted: list[tuple[str, int]] = []
        self.proxy = Proxy(self.routing, self.service_of, self.wait, Permits(self.ask), self.note)
        self.runners: list[web.AppRunner] = []

    def note(self, service: str, status: int, seconds: float) -> None:
        assert 0 <= seconds < 60
        self.noted.append((service, status))

    async def service_of(self, key: str) -> str | None:
        return self.allowed.get(key)

    async def ask(self, name: str, value: object = None) -> None:
        raise AssertionError(f"no model here has a budget: {name}")

    async def wait(self, service: str) -> None:
        self.waits += 1
        raise Refusal(503, "model_failed", "it cannot start")

    async def start(self, *engines: Engine, key: str = "") -> str:
        """Start engines and the gateway; return its URL."""
        replicas = {}
        for number, engine in enumerate(engines):
            runner, replicas[f"tiny-{number}"] = await _listening(engine)
            self.runners.append(runner)
        self.routing.update({SERVICE: {"model": "real", "key": key, "replicas": replicas}})
        runner, address = await _served(self.proxy.application())
        self.runners.insert(0, runner)
        return f"http://{address}/v1"


def scenario(run: Callable[[World, aiohttp.ClientSession], Awaitable[None]]) -> None:
    """Run a scenario, and end all servers after it."""

    async def whole() -> None:
        world = World()
        async with aiohttp.ClientSession(headers={"authorization": "Bearer key"}) as client:
            try:
                await asyncio.wait_for(run(world, client), 30)
            finally:
                for runner in world.runners:
                    await runner.cleanup()

    asyncio.run(whole())


BODY = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}


async def busy(_: web.Request) -> web.Response:
    return web.json_response({"error": {"message": "busy"}}, status=503)


async def reset(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def echo(request: web.Request) -> web.Response:
    return web.json_response({"body": await request.json(), "key": request.headers.get("authorization", "")})


@pytest.mark.parametrize("broken", [busy, reset])
def test_request_is_answered_by_another_instance_when_the_first_does_not_answer(broken: Engine) -> None:
    async def run(world: World, client: aiohttp.ClientSession) -> None:
        url = await world.start(broken, echo, key="engine-key")
        async with client.post(f"{url}/chat/completions", json=BODY) as answer:
            found = await answer.json()
        assert (answer.status, answer.headers["x-lattice-instance"]) == (200, "tiny-1")
        assert found == {"body": BODY | {"model": "real"}, "key": "Bearer engine-key"}

    scenario(run)


def test_each_request_is_noted_with_its_service_and_status() -> None:
    async def run(world: World, client: aiohttp.ClientSession) -> None:
        has_begun = asyncio.Event()

        async def endless(_: web.Request) -> web.Response:
            has_begun.set()
            await asyncio.Event().wait()
            return web.Response()

        url = f"{await world.start(echo)}/chat/completions"
        await client.post(url, json=BODY)
        await client.post(url, json={"model": "other"})
        await client.post(url, json=BODY, headers={"authorization": "Bearer guessed"})
        url = f"{await world.start(endless)}/chat/completions"
        asking = asyncio.create_task(client.post(url, json=BODY))
        await has_begun.wait()
        asking.cancel()
        while len(world.noted) < 4:
            await asyncio.sleep(0.01)
        # 499: the caller has left.
        assert world.noted == [(SERVICE, 200), (SERVICE, 404), ("", 401), (SERVICE, 499)]

    scenario(run)


def test_error_of_an_engine_is_passed_on_and_not_tried_again() -> None:
    async def run(world: World, client: aiohttp.ClientSession) -> None:
        calls = []

        async def failing(request: web.Request) -> web.Response:
            calls.append(request.path)
            return web.json_response({"error": {"message": "empty messages"}}, status=500)

        url = await world.start(failing, failing)
        async with client.post(f"{url}/chat/completions", json=BODY) as answer:
            assert (answer.status, (await answer.json())["error"]["message"]) == (500, "empty messages")
        assert calls == ["/v1/chat/completions"]

    scenario(run)


def test_stream_is_not_repeated_after_its_first_byte() -> None:
    async def run(world: World, client: aiohttp.ClientSession) -> None:
        async def breaking(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            await response.write(word("one"))
            assert request.transport is not None
            request.transport.abort()
            return response

        url = await world.start(breaking, echo)
        async with client.post(f"{url}/chat/completions", json=BODY | {"stream": True}) as answer:
            whole = (await answer.read()).split(b"\n\n")
        assert whole[0] + b"\n\n" == word("one")
        assert json.loads(whole[1][6:])["error"]["code"] == "replica_lost"

    scenario(run)


def test_engine_stops_when_the_caller_leaves_or_its_key_ends() -> None:
    async def run(world: World, client: aiohttp.ClientSession) -> None:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def slow(request: web.Request) -> web.Response:
            begun.set()
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()
            return web.Response()

        url = await world.start(slow)
        for leave in (lambda task: task.cancel(), lambda _: world.proxy.end_requests("key")):
            begun.clear()
            ended.clear()
            task = asyncio.create_task(client.post(f"{url}/chat/completions", json=BODY))
            await begun.wait()
            leave(task)
            await ended.wait()
            await asyncio.gather(task, return_exceptions=True)
        # The first got no answer, since its caller was gone; the second was told why its engine was stopped.
        answer = task.result()
        assert (answer.status, (await answer.json())["error"]["code"]) == (401, "invalid_api_key")

    scenario(run)


@pytest.mark.parametrize(
    ("key", "body", "status", "code"),
    [
        ("other", json.dumps(BODY), 401, "invalid_api_key"),
        ("", json.dumps(BODY), 401, "invalid_api_key"),
        ("key", "{", 400, "invalid_json"),
        ("key", "[]", 400, "invalid_json"),
        ("key", json.dumps(BODY | {"model": "large"}), 404, "model_not_found"),
        ("key", json.dumps(BODY), 503, "model_failed"),
    ],
)
def test_request_is_refused_in_the_form_of_the_api(key: str, body: str, status: int, code: str) -> None:
    async def run(world: World, client: aiohttp.ClientSession) -> None:
        url = await world.start()
        headers = {"authorization": f"Bearer {key}"}
        async with client.post(f"{url}/chat/completions", data=body, headers=headers) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (status, code)
            assert answer.headers["x-should-retry"] == "false"
        assert world.waits == (status == 503)

    scenario(run)


def test_models_are_those_of_the_key() -> None:
    async def run(world: World, client: aiohttp.ClientSession) -> None:
        url = await world.start()
        async with client.get(f"{url}/models", headers={"authorization": "", "x-api-key": "key"}) as answer:
            assert [model["id"] for model in (await answer.json())["data"]] == ["tiny"]

    scenario(run)


def test_stream_hides_the_use_that_only_the_gateway_asked_for_and_counts_it() -> None:
    use = event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7})
    sent = word("a") + word("", "stop") + use + b"data: [DONE]\n\n"
    for hides in (True, False):
        watch = Watch(hides_usage=hides)
        passed = b"".join(watch.feed(sent))
        assert passed == (sent.replace(use, b"") if hides else sent)
        assert watch.usage.tokens(Estimates().of({}, "", None)) == 7
    watch = Watch()
    list(watch.feed(word("a") + word("b") + word("", "stop")))
    assert watch.usage.tokens(Estimates().of({"prompt": "12345678"}, "", None)) == 2 + 3


def test_estimates_learn_from_answers() -> None:
    estimates, body = Estimates(), {"messages": [{"role": "user", "content": "x" * 396}]}
    first = estimates.of(body, "/v1/chat/completions", None)
    assert (first.prompt, first.tokens) == (100, 115 + 1024)
    assert estimates.of(body, "/v1/chat/completions", 500).tokens == 500
    assert estimates.of({**body, "max_tokens": 10, "n": 2}, "/v1/chat/completions", 50).tokens == 115 + 20
    assert estimates.of({"input": ["y" * 40], "dimensions": 9}, "/v1/embeddings", None).tokens == 12
    for _ in range(10):
        estimates.learn(first, Usage(150, 7))
    assert estimates.of(body, "/v1/chat/completions", None).tokens == 150 + 7
    picture = {"messages": [{"content": [{"image_url": {"url": "data:image/png;base64," + "A" * 100_000}}]}]}
    assert estimates.of(picture, "", None).prompt == 1000


@pytest.mark.parametrize(
    ("status", "headers", "body", "expected"),
    [
        (429, {"retry-after": "3"}, {}, 3.0),
        (429, {"retry-after-ms": "250", "retry-after": "1"}, {}, 0.25),
        (429, {}, {"error": {"code": "rate_limit_exceeded"}}, None),
        (529, {"retry-after": "soon"}, {"error": {"type": "overloaded_error"}}, None),
        (503, {"retry-after": "2"}, {}, 2.0),
        (429, {"retry-after": "Thu, 01 Jan 2099 00:00:00 GMT"}, {}, 3600.0),
        (429, {"retry-after": "-5"}, [], 0.0),
        (429, {"retry-after": "1"}, {"error": {"code": "insufficient_quota"}}, "passed on"),
        (503, {}, {}, "passed on"),
        (500, {"retry-after": "1"}, {}, "passed on"),
    ],
)
def test_refusals_because_of_a_limit_and_their_times(
    status: int, headers: dict[str, str], body: object, expected: float | str | None
) -> None:
    found = retry_after_s(headers) if is_limit(status, headers, json.dumps(body).encode()) else "passed on"
    assert found == expected


def test_limits_are_read_from_the_headers_of_several_providers() -> None:
    openai = {f"x-ratelimit-{name}": value for name, value in (("remaining-requests", "59"), ("reset-requests", "1s"))}
    openai |= {"x-ratelimit-remaining-tokens": "149984", "x-ratelimit-reset-tokens": "6m0.5s"}
    assert told_limits(openai, 0.0) == {"requests": [59, 1.0], "tokens": [149984, 360.5]}
    name = "anthropic-ratelimit-tokens"
    other = {f"{name}-remaining": "0", f"{name}-reset": "1970-01-01T00:01:00Z"}
    assert told_limits(other, 45.0) == {"tokens": [0, 15.0]}
    assert told_limits({"x-ratelimit-remaining-requests": "1"}, 0.0) == {}
    wrong = {"x-ratelimit-remaining-requests": "-1", "x-ratelimit-reset-tokens": "soon"}
    assert told_limits({**openai, **wrong}, 0.0) == {}
    assert [seconds(text, 0.0) for text in ("12ms", "1h2m3s", "20", "-3", "nan", "", "1x")] == [
        0.012, 3723.0, 20.0, 0.0, None, None, None
    ]  # fmt: skip


@given(st.text(max_size=30) | st.from_regex(r"[0-9hms.:TZ-]*", fullmatch=True))
def test_any_text_of_a_header_is_a_number_of_seconds_or_tells_nothing(text: str) -> None:
    found = told_limits({"x-ratelimit-remaining-tokens": text, "x-ratelimit-reset-tokens": text}, 0.0)
    assert not found or found["tokens"][0] >= 0 <= found["tokens"][1] < float("inf")
