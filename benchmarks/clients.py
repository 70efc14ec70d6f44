"""One of the sixteen client processes of W4: `python -m benchmarks.clients SIDE ADDRESS SECONDS`.

It says `ready`, waits for a line, runs chains for the seconds, and says `done` and how many it finished.
"""

import sys
import time
from collections.abc import Callable


def main() -> None:
    """Run one client."""
    side, address, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    if side == "lattice":
        from benchmarks import lattice_side
        from lattice_client import LatticeClient

        with LatticeClient(address) as client:
            lattice_side.one(client)
            _measure(lambda deadline: lattice_side.chains_until(client, deadline), seconds)
        return
    import ray

    from benchmarks import ray_side

    ray.init(address=address, log_to_driver=False, logging_level="ERROR", _node_ip_address="127.0.0.1")
    caller = ray_side.Tasks() if side == "ray tasks" else ray_side.Actors(1)
    ray_side.one(caller)
    _measure(lambda deadline: ray_side.chains_until(caller, deadline), seconds)


def _measure(chains_until: Callable[[float], int], seconds: float) -> None:
    print("ready", flush=True)
    sys.stdin.readline()
    print("done", chains_until(time.time() + seconds), flush=True)


if __name__ == "__main__":
    main()
