"""Raw Ray, with tasks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import side


@contextmanager
def started(cpus: int) -> Iterator[side.Workloads]:
    """Run Ray on this machine."""
    ray.init(
        address="local", num_cpus=cpus, log_to_driver=False, logging_level="ERROR", include_dashboard=False,
        _node_ip_address="127.0.0.1",
    )  # fmt: skip
    noop, gather = ray.remote(side.noop), ray.remote(lambda *values: side.count(list(values)))

    def chain() -> Any:
        last = noop.remote(1)
        for _ in range(side.LENGTH - 1):
            last = noop.remote(last)
        return ray.get(last)

    def fan() -> Any:
        first = noop.remote(1)
        return ray.get(gather.remote(*[noop.remote(first) for _ in range(side.WIDTH)]))

    try:
        yield {"W1": lambda: ray.get(noop.remote(1)), "W2": chain, "W3": fan}
    finally:
        ray.shutdown()


if __name__ == "__main__":
    side.run(started, "ray")
