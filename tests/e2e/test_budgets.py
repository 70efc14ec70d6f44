"""Budgets of models: requests beyond a provider's limit wait at the gateways, of all tasks, tenants and nodes."""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from lattice_client import LatticeClient, TaskDefinitionError, context, secret, task
from lattice_client.cli.main import main
from tests.e2e.providers import Provider
from tests.e2e.rooms import WAIT_S
from tests.e2e.test_services import until


@pytest.fixture
def provide() -> Iterator[Callable[..., Provider]]:
    """Starts providers, and stops them when the test ends."""
    found: list[Provider] = []

    def start(*arguments: Any, **more: Any) -> Provider:
        found.append(Provider(*arguments, **more))
        threading.Thread(target=found[-1].serve_forever, daemon=True).start()
        return found[-1]

    yield start
    for one in found:
        one.shutdown()
        one.server_close()


@pytest.fixture
def models(client: LatticeClient) -> Iterator[LatticeClient]:
    """The client, whose models are stopped when the test ends."""
    yield client
    for service in client.llm.list():
        client.services.stop(service.spec.name, timeout=WAIT_S)


@task(cpu=0.01)
async def ask_many(count: int, tokens: int = 1, max_tokens: int | None = None) -> list[int]:
    """Make requests at once; return their statuses."""
    import aiohttp

    model = await context.llm_async("gpt")
    body = {"model": "gpt", "prompt": "one two", "tokens": tokens}
    if max_tokens is not None:
        body["max_tokens"] = max_tokens
    headers = {"authorization": f"Bearer {model.api_key}"}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask() -> int:
            async with session.post(f"{model.base_url}/completions", json=body) as answer:
                await answer.read()
                return answer.status

        return await asyncio.gather(*(ask() for _ in range(count)))


def run_many(client: LatticeClient, tasks: int, **inputs: Any) -> Counter[int]:
    """Run tasks side by side; return how often each status came."""
    workflow = client.create_workflow()
    for number in range(tasks):
        workflow.add_task(ask_many, inputs, task_id=f"t{number}")
    found = workflow.run().result(timeout=4 * WAIT_S)
    answers = [found["result"]] if tasks == 1 else [one["result"] for one in found.values()]
    return Counter(status for one in answers for status in one)


def check_use(client: LatticeClient, permitted: int) -> None:
    """Check the use of the model, once the ends of its last requests are reported."""
    until(lambda: not client.services.get("gpt").budget_use.open, "all requests have ended")
    use = client.services.get("gpt").budget_use
    assert (use.permitted, use.refused, use.waiting) == (permitted, 0, 0)


def test_hundreds_of_requests_of_many_tasks_get_no_refusal(
    models: LatticeClient, provide: Callable[..., Provider]
) -> None:
    provider = provide(2.0, 150)
    models.llm.start("gpt", base_url=provider.url, requests_per_minute=4500, limit_window=2.0)
    assert run_many(models, 16, count=25) == {200: 400}
    assert provider.statuses == {200: 400}
    check_use(models, 400)


def test_tokens_are_estimated_and_replaced_by_those_that_were_used(
    models: LatticeClient, provide: Callable[..., Provider]
) -> None:
    provider = provide(1.0, 1000, tokens=600)
    models.llm.start("gpt", base_url=provider.url, tokens_per_minute=36_000, limit_window=1.0)
    # Each may have 100 tokens and uses 12, so that 50 in a window fit when the use is known.
    assert run_many(models, 2, count=60, tokens=10, max_tokens=100) == {200: 120}
    assert provider.statuses == {200: 120}
    assert run_many(models, 1, count=1, max_tokens=700) == {400: 1}


def test_requests_at_once_are_limited(models: LatticeClient, provide: Callable[..., Provider]) -> None:
    provider = provide(1.0, 1000, delay_s=0.02)
    models.llm.start("gpt", base_url=provider.url, concurrency=3)
    assert run_many(models, 4, count=10) == {200: 40}
    assert provider.most_at_once == 3


def test_time_of_a_refusal_stops_all_requests_and_no_task_sees_it(
    models: LatticeClient, provide: Callable[..., Provider]
) -> None:
    provider = provide(1.0, 1000)
    provider.next_refusals.append("1")
    models.llm.start("gpt", base_url=provider.url, requests_per_minute=600, concurrency=1)
    began = time.monotonic()
    assert run_many(models, 3, count=3) == {200: 9}
    assert provider.statuses == {200: 9, 429: 1}
    assert min(at for at, _ in provider.taken) >= began + 1.0
    assert models.services.get("gpt").budget_use.refused == 1


def test_a_refused_request_waits_for_the_time_of_its_own_refusal(
    models: LatticeClient, provide: Callable[..., Provider]
) -> None:
    provider = provide(1.0, 1000)
    provider.next_refusals.append("1")
    models.llm.start("gpt", base_url=provider.url, requests_per_minute=600)
    began = time.monotonic()
    assert run_many(models, 1, count=1) == {200: 1}
    assert provider.statuses == {200: 1, 429: 1}
    assert provider.taken[0][0] >= began + 1.0


@task(cpu=0.01, timeout=WAIT_S)
async def ask_until_refused() -> int:
    """Make requests until one is not answered; return its status."""
    import aiohttp

    model = await context.llm_async("gpt")
    headers = {"authorization": f"Bearer {model.api_key}"}
    body = {"model": "gpt", "prompt": "one", "tokens": 1}
    async with aiohttp.ClientSession(headers=headers) as session:
        while True:
            async with session.post(f"{model.base_url}/completions", json=body) as answer:
                await answer.read()
                if answer.status != 200:
                    return answer.status
            await asyncio.sleep(0.02)


def test_a_model_that_was_stopped_is_not_asked(models: LatticeClient, provide: Callable[..., Provider]) -> None:
    provider = provide(1.0, 1000)
    models.llm.start("gpt", base_url=provider.url)
    workflow = models.create_workflow()
    workflow.add_task(ask_until_refused)
    run = workflow.run()
    until(lambda: len(provider.taken) > 2, "the task makes requests")
    models.services.stop("gpt", timeout=WAIT_S)
    assert run.result(timeout=WAIT_S) == {"result": 503}


@pytest.mark.parametrize(("elsewhere", "window_s"), [(12, 2.0), (0, WAIT_S)])
def test_limits_that_a_provider_tells_hold_where_its_key_is_used_elsewhere_too(
    models: LatticeClient, provide: Callable[..., Provider], elsewhere: int, window_s: float
) -> None:
    provider = provide(window_s, 20)
    provider.elsewhere = elsewhere
    models.llm.start("gpt", base_url=provider.url, requests_per_minute=round(1200 / window_s), limit_window=window_s)
    assert run_many(models, 1, count=1) == {200: 1}
    assert run_many(models, 1, count=15) == {200: 15}
    # None is refused; with 8 requests in a window for us the last ones wait for the next window.
    assert provider.statuses == {200: 16}
    assert (provider.taken[-1][0] > provider.taken[0][0] + window_s) is (elsewhere > 0)


def test_budget_is_shown_and_wrong_ones_are_refused(
    models: LatticeClient, address: str, provide: Callable[..., Provider]
) -> None:
    provider = provide(1.0, 1000)

    def lattice(*arguments: str) -> Any:
        return CliRunner(env={"LATTICE_TARGET": address}).invoke(main, ["llm", *arguments])

    flags = ["--requests-per-minute", "120", "--tokens-per-minute", "60000", "--limit-window", "30"]
    assert lattice("start", "gpt", "--base-url", provider.url, *flags).exit_code == 0
    assert run_many(models, 1, count=2) == {200: 2}

    def shown() -> tuple[str, ...]:
        heading, row = (line.split("\t") for line in lattice("list").stdout.splitlines())
        found = dict(zip(heading, row, strict=True))
        return found["requests"], found["tokens"], found["waiting"]

    # The gateway reports the tokens that were used after the answer.
    until(lambda: shown() == ("2/60", "6/30000", "0"), "the list shows what was used")
    for wrong in ({"requests_per_minute": 0}, {"limit_window": 5}, {"tokens_per_minute": 1.5}):
        with pytest.raises(TaskDefinitionError, match=next(iter(wrong))):
            models.llm.start("gpt", base_url=provider.url, **wrong)


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_thousand_tasks_use_nearly_all_of_a_limit_and_get_no_refusal(
    models: LatticeClient, provide: Callable[..., Provider]
) -> None:
    limit, window_s, count = 250, 10.0, 1000
    provider = provide(window_s, limit)
    models.llm.start("gpt", base_url=provider.url, requests_per_minute=1500, limit_window=window_s)
    workflow = models.create_workflow()
    alone = task(cpu=0)(ask_many.function)
    for number in range(count):
        workflow.add_task(alone, {"count": 1}, task_id=f"t{number}")
    found = workflow.run().result(timeout=4 * WAIT_S)
    assert Counter(status for one in found.values() for status in one["result"]) == {200: count}
    assert provider.statuses == {200: count}
    times = [at for at, _ in provider.taken]
    assert (count / limit - 1) * window_s / (times[-limit] - times[0]) >= 0.9


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
def test_tenants_share_the_limit_of_a_key_and_use_nearly_all_of_it(
    address: str, provide: Callable[..., Provider], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROVIDER_KEY", "key-of-the-provider")
    limit, window_s, tenants, tasks, count = 60, 15.0, ("red", "blue"), 10, 15
    provider, statuses = provide(window_s, limit), Counter[int]()

    def run(tenant: str) -> None:
        with LatticeClient(address, tenant=tenant) as client:
            key = secret("PROVIDER_KEY")
            client.llm.start("gpt", base_url=provider.url, api_key=key, requests_per_minute=240, limit_window=window_s)
            statuses.update(run_many(client, tasks, count=count))
            client.services.stop("gpt", timeout=WAIT_S)

    threads = [threading.Thread(target=run, args=(tenant,)) for tenant in tenants]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = len(tenants) * tasks * count
    assert statuses == {200: wanted}
    assert provider.statuses == {200: wanted}
    times = [at for at, _ in provider.taken]
    windows = wanted / limit - 1  # The windows between the first burst and the last.
    assert windows * window_s / (times[-limit] - times[0]) >= 0.9
