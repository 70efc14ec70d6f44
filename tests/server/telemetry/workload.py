"""A server whose metrics are read, and work that makes each metric appear."""

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ParamSpec
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

from lattice_client import AsyncLatticeClient, task
from lattice_server.app import App
from tests.server.apps import serving

P = ParamSpec("P")
Samples = Mapping[tuple[str, tuple[tuple[str, str], ...]], float]


def on_a_loop(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Run a test on an event loop of its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def called() -> None:
            await test(*args, **kwargs)

        asyncio.run(called())

    return run


@task
def double(x: int) -> int:
    """Return twice a number."""
    return 2 * x


@task(retries=1, retry_backoff=0.0)
def fail_once(folder: str) -> str:
    """Fail the first time."""
    marker = Path(folder) / "failed"
    if not marker.exists():
        marker.touch()
        raise ValueError("the first time")
    return "done"


@task
def count(n: int) -> Iterator[int]:
    """Stream numbers."""
    yield from range(n)


@task
def fail(x: int) -> int:
    """Fail."""
    raise ValueError(x)


@asynccontextmanager
async def measured(**settings: object) -> AsyncIterator[tuple[App, AsyncLatticeClient]]:
    """Serve with one worker and metrics for Prometheus, and with a client."""
    async with serving(**{"metrics": "prometheus", "session_ttl_s": 30.0} | settings) as app:
        await app.ready()
        async with AsyncLatticeClient(app.address) as client:
            yield app, client


async def page_of(app: App) -> str:
    """Return what Prometheus reads."""

    def read() -> str:
        with urlopen(app.metrics_url, timeout=30) as response:
            found: bytes = response.read()
            return found.decode()

    return await asyncio.to_thread(read)


def samples_of(page: str) -> Samples:
    """Return the values of a page by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def labelled(samples: Samples, name: str) -> dict[tuple[str, ...], float]:
    """Return the values of one sample by the values of its labels, in the order of the labels' names."""
    return {tuple(value for _, value in labels): number for (known, labels), number in samples.items() if known == name}
