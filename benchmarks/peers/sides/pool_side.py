"""`concurrent.futures.ProcessPoolExecutor`, which has no graphs: the caller waits for each step of a chain."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import side


@contextmanager
def started(cpus: int) -> Iterator[side.Workloads]:
    """Run one process for each processor."""
    with ProcessPoolExecutor(cpus) as pool:

        def chain() -> Any:
            last = 1
            for _ in range(side.LENGTH):
                last = pool.submit(side.noop, last).result()
            return last

        def fan() -> Any:
            first = pool.submit(side.noop, 1).result()
            middle = [pool.submit(side.noop, first) for _ in range(side.WIDTH)]
            return pool.submit(side.count, [future.result() for future in middle]).result()

        yield {"W1": lambda: pool.submit(side.noop, 1).result(), "W2": chain, "W3": fan}


if __name__ == "__main__":
    side.run(started)
