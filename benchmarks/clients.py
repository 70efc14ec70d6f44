"""Some of the sixteen clients of W4, in one process: `python -m benchmarks.clients SIDE ADDRESS THREADS SECONDS`.

It says `ready`, waits for a line, runs chains in all threads for the seconds, and says `done` and how many it finished.
"""

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def main() -> None:
    """Run the clients."""
    side, address, threads, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    if side == "lattice":
        from benchmarks import lattice_side
        from lattice_client import LatticeClient

        with LatticeClient(address) as client:
            lattice_side.one(client)
            _measure(lambda deadline: lattice_side.chains_until(client, deadline), threads, seconds)
        return
    import ray

    from benchmarks import ray_side

    ray.init(address=address, log_to_driver=False, logging_level="ERROR", _node_ip_address="127.0.0.1")
    caller = ray_side.Tasks() if side == "ray tasks" else ray_side.Actors(2)
    ray_side.one(caller)
    _measure(lambda deadline: ray_side.chains_until(caller, deadline), threads, seconds)


def _measure(chains_until: Callable[[float], int], threads: int, seconds: float) -> None:
    with ThreadPoolExecutor(threads) as pool:
        print("ready", flush=True)
        sys.stdin.readline()
        print("done", sum(pool.map(chains_until, [time.time() + seconds] * threads)), flush=True)


if __name__ == "__main__":
    main()
