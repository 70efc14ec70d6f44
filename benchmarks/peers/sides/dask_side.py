"""Dask distributed: one worker process with one thread for each processor."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import side
from distributed import Client, LocalCluster


@contextmanager
def started(cpus: int) -> Iterator[side.Workloads]:
    """Run a scheduler and workers on this machine."""
    cluster = LocalCluster(
        n_workers=cpus, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
    )
    with cluster, Client(cluster) as client:

        def one() -> Any:
            return client.submit(side.noop, 1, pure=False).result()

        def chain() -> Any:
            last = client.submit(side.noop, 1, pure=False)
            for _ in range(side.LENGTH - 1):
                last = client.submit(side.noop, last, pure=False)
            return last.result()

        def fan() -> Any:
            first = client.submit(side.noop, 1, pure=False)
            middle = client.map(side.noop, [first] * side.WIDTH, pure=False)
            return client.submit(side.count, middle, pure=False).result()

        yield {"W1": one, "W2": chain, "W3": fan}


if __name__ == "__main__":
    side.run(started, "distributed", "dask")
