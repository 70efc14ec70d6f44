"""The parts of a gateway: whole answers, the choice of an instance, and the requests that it passes on."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Collection

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from lattice_worker.gateway.limits import seconds, told_limits
from lattice_worker.gateway.permits import Permits
from lattice_worker.gateway.proxy import Proxy
from lattice_worker.gateway.refusals import MAX_REQUEST_BYTES, Refusal, is_limit, retry_after_s
from lattice_worker.gateway.routing import Routing, Target
from lattice_worker.gateway.stream import Watch
from lattice_worker.gateway.usage import Estimates, Usage
from tests.worker.gateways import (
    BODY,
    SERVICE,
    Engine,
    Servers,
    Slow,
    breaking,
    busy,
    check_broken_stream,
    echo,
    event,
    reset,
    run_in,
    word,
)


@given(
    st.lists(st.text(max_size=20), max_size=5),
    st.sampled_from(["stop", "length", "abort", None]),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.data(),
)
def test_stream_is_complete_by_its_reason_however_it_is_split(
    words: list[str], reason: str | None, line_end: bytes, has_end: bool, data: st.DataObject
) -> None:
    whole = [word(text) for text in words] + ([word("", reason)] if reason else []) + [b"data: [DONE]\n\n"]
    sent = b"".join(whole).replace(b"\n", line_end)
    if not has_end:
        sent = sent.removesuffix(line_end * 2)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=6)))
    watch, passed = Watch(), b""
    for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
        passed += b"".join(watch.feed(sent[start:end]))
    passed = (passed + b"".join(watch.end())).replace(b"\r\n", b"\n")
    assert watch.is_complete is (reason in {"stop", "length"})
    assert watch.is_aborted is (reason == "abort")
    expected = b"".join(whole) if reason != "abort" else b"".join(word(text) for text in words)
    assert passed == expected


@pytest.mark.parametrize(
    ("sent", "is_complete"),
    [
        (event(type="response.output_text.delta", delta="x"), False),
        (event(type="response.completed"), True),
        (event(type="response.completed", response={"usage": {"input_tokens": 1, "output_tokens": 2}}), True),
        (event(error={"message": "too long"}), True),
        (b": waiting\n\n", False),
        (b"data: [DONE]\n\n", False),
        (b"data: [1]\n\n", False),
        (event(choices=None), False),
    ],
)
def test_stream_of_other_forms_is_complete_when_it_says_so(sent: bytes, is_complete: bool) -> None:
    for hides_usage in (False, True):
        watch = Watch(hides_usage=hides_usage)
        assert b"".join(watch.feed(sent)) == sent
        assert watch.is_complete is is_complete


def test_stream_of_several_choices_is_complete_when_each_has_a_reason_to_finish() -> None:
    def choice(index: int, reason: str | None = None) -> bytes:
        return event(choices=[{"index": index, "delta": {"content": "x"}, "finish_reason": reason}])

    watch, states = Watch(), []
    for sent in (choice(0), choice(1), choice(0, "stop"), choice(1, "length"), choice(2), choice(2, "stop")):
        list(watch.feed(sent))
        states.append(watch.is_complete)
    assert states == [False, False, False, True, False, True]


def test_events_are_the_same_wherever_a_stream_with_long_line_ends_is_cut() -> None:
    sent = (word("a") + word("b", "stop")).replace(b"\n", b"\r\n")
    for cut in range(len(sent)):
        watch = Watch()
        assert [*watch.feed(sent[:cut]), *watch.feed(sent[cut:])] == [word("a"), word("b", "stop")]


def test_part_of_an_event_at_the_end_of_a_stream_is_not_passed_on() -> None:
    watch = Watch()
    assert list(watch.feed(word("a", "stop")[:-9])) == []
    assert list(watch.end()) == []
    assert not watch.is_complete


def chosen(routing: Routing, without: Collection[Target] = ()) -> str:
    found = routing.choose(SERVICE, without)
    assert found is not None
    return found.instance_id


def test_routing_prefers_the_fewest_requests_and_then_the_own_node() -> None:
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
    one, other = Target("a", "h:1"), Target("b", "h:2", "gateway-2")
    assert chosen(routing, [one]) == "b"
    assert chosen(routing, [Target("b", "h:2", "gateway-1"), one]) == "b"
    assert routing.choose(SERVICE, [one, other]) is None
    routing.end("b")
    routing.end("b")
    assert chosen(routing) == "b"


class World(Servers):
    """A gateway before some engines; `waits` counts the requests that wait for an instance."""

    def __init__(self) -> None:
        super().__init__()
        self.routing = Routing()
        self.waits = 0
        self.allowed = {"key": SERVICE}
        self.noted: list[tuple[str, int]] = []
        self.permits = Permits(self.ask)
        self.proxy = Proxy(self.routing, self.service_of, self.wait, self.permits, self.note)

    def note(self, service: str, status: int, seconds: float) -> None:
        assert 0 <= seconds < 60
        self.noted.append((service, status))

    async def service_of(self, key: str) -> str | None:
        return self.allowed.get(key)

    def permit_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have each request that needs a permit get one."""

        async def acquire(service: str, tokens: int, *, is_again: bool = False) -> str:
            return "1"

        monkeypatch.setattr(self.permits, "acquire", acquire)

    async def wait(self, service: str) -> None:
        self.waits += 1
        raise Refusal(503, "model_failed", "it cannot start")

    async def start(self, *engines: Engine, key: str = "") -> str:
        """Start engines and the gateway; return its URL."""
        self.route({f"tiny-{number}": await self.engine(engine) for number, engine in enumerate(engines)}, key)
        return f"http://{await self.serve(self.proxy.door.application())}/v1"

    def route(self, replicas: dict[str, str], key: str = "", *, has_budget: bool = False) -> None:
        """Have these instances take requests."""
        self.routing.update({SERVICE: {"model": "real", "key": key, "replicas": replicas, "has_budget": has_budget}})


def scenario(run: Callable[[World, aiohttp.ClientSession], Awaitable[None]]) -> None:
    run_in(World, run)


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
        endless = Slow()
        url = f"{await world.start(echo)}/chat/completions"
        await client.post(url, json=BODY)
        await client.post(url, json={"model": "other"})
        await client.post(url, json=BODY, headers={"authorization": "Bearer guessed"})
        url = f"{await world.start(endless)}/chat/completions"
        asking = asyncio.create_task(client.post(url, json=BODY))
        await endless.begun.wait()
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


def test_whole_answer_of_an_engine_that_gave_up_is_no_answer() -> None:
    async def run(world: World, client: aiohttp.ClientSession) -> None:
        async def stopped(_: web.Request) -> web.Response:
            message = {"role": "assistant", "content": "half of it"}
            return web.json_response({"choices": [{"index": 0, "message": message, "finish_reason": "abort"}]})

        async def whole(_: web.Request) -> web.Response:
            return web.json_response({"choices": [{"message": {"content": "to abort"}, "finish_reason": "stop"}]})

        url = f"{await world.start(stopped, whole)}/chat/completions"
        async with client.post(url, json=BODY) as answer:
            assert (answer.status, answer.headers["x-lattice-instance"]) == (200, "tiny-1")

    scenario(run)


def test_stream_is_not_repeated_after_its_first_byte() -> None:
    async def run(world: World, client: aiohttp.ClientSession) -> None:
        await check_broken_stream(client, f"{await world.start(breaking, echo)}/chat/completions")

    scenario(run)


def test_engine_stops_when_the_caller_leaves_or_its_key_ends() -> None:
    async def run(world: World, client: aiohttp.ClientSession) -> None:
        slow = Slow()
        url = await world.start(slow)
        for leave in (lambda task: task.cancel(), lambda _: world.proxy.door.end_requests("key")):
            slow.begun.clear()
            slow.ended.clear()
            task = asyncio.create_task(client.post(f"{url}/chat/completions", json=BODY))
            await slow.begun.wait()
            leave(task)
            await slow.ended.wait()
            await asyncio.gather(task, return_exceptions=True)
        # The first got no answer, since its caller was gone; the second was told why its engine was stopped.
        answer = task.result()
        assert (answer.status, (await answer.json())["error"]["code"]) == (401, "invalid_api_key")

    scenario(run)


def test_slow_reader_holds_up_its_engine_until_its_key_ends() -> None:
    async def run(world: World, client: aiohttp.ClientSession) -> None:
        sent, ended = 0, asyncio.Event()

        async def endless(request: web.Request) -> web.StreamResponse:
            nonlocal sent
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            try:
                while True:
                    await response.write(word("x" * 100_000))
                    sent += 1
            finally:
                ended.set()

        url = await world.start(endless)
        async with client.post(f"{url}/chat/completions", json=BODY | {"stream": True}):
            before = -1
            while sent != before:  # Until the buffers on the way are full.
                before = sent
                await asyncio.sleep(0.2)
            assert 0 < sent < 1000
            world.proxy.door.end_requests("key")
            await ended.wait()

    scenario(run)


def test_answer_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(world: World, client: aiohttp.ClientSession) -> None:
        async def large(_: web.Request) -> web.Response:
            return web.Response(body=b"x" * 2000, content_type="application/json")

        monkeypatch.setattr("lattice_worker.gateway.engines.MAX_ANSWER_BYTES", 1000)
        url = await world.start(large)
        async with client.post(f"{url}/chat/completions", json=BODY) as answer:
            assert (answer.status, (await answer.json())["error"]["code"]) == (502, "answer_too_large")

    scenario(run)


def test_gateway_serves_after_headers_that_are_too_large() -> None:
    async def run(world: World, client: aiohttp.ClientSession) -> None:
        url = f"{await world.start(echo)}/chat/completions"
        async with client.post(url, json=BODY, headers={"x-long": "x" * 100_000}) as answer:
            assert answer.status == 400
        async with client.post(url, json=BODY) as answer:
            assert answer.status == 200

    scenario(run)


@pytest.mark.parametrize(
    ("key", "body", "status", "code"),
    [
        ("other", json.dumps(BODY), 401, "invalid_api_key"),
        ("", json.dumps(BODY), 401, "invalid_api_key"),
        ("key", "{", 400, "invalid_json"),
        ("key", "[]", 400, "invalid_json"),
        ("key", "[" * 100_000, 400, "invalid_json"),
        ("key", " " * (MAX_REQUEST_BYTES + 1), 413, "request_too_large"),
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


def test_body_is_passed_on_or_refused_however_deep_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(world: World, client: aiohttp.ClientSession) -> None:
        world.permit_all(monkeypatch)

        async def content(_: web.Request) -> web.Response:
            return web.json_response({})

        url, statuses = await world.start(content), []
        # A budget estimates the text, which goes deeper than reading it.
        for budget in (False, True):
            world.route({"tiny-1": await world.engine(content)}, has_budget=budget)
            for depth in range(100, 1100, 20):
                body = '{"model": "tiny", "messages": ' + "[" * depth + "]" * depth + "}"
                async with client.post(f"{url}/chat/completions", data=body) as answer:
                    statuses.append(answer.status)
        assert (statuses[0], statuses[-1], set(statuses)) == (200, 400, {200, 400})

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


def test_numbers_beyond_all_bounds_are_counted_as_a_number_that_can_be_sent() -> None:
    estimates, huge = Estimates(), 10**4000
    body = {"prompt": "x" * 400, "max_tokens": huge, "n": huge}
    estimate = estimates.of(body, "/v1/completions", None)
    usage = Usage()
    assert usage.note({"usage": {"prompt_tokens": huge, "completion_tokens": huge, "total_tokens": huge}})
    estimates.learn(estimate, usage)
    for tokens in (estimate.tokens, usage.tokens(estimate), estimates.of({"prompt": "x"}, "", None).tokens):
        assert tokens is not None
        assert 0 < float(tokens) <= 2**42


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
