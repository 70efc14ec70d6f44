"""One of the sixteen client processes of W4: `python -m benchmarks.clients SIDE ADDRESS START SECONDS`."""

import sys
import time


def main() -> None:
    """Wait for the start, run chains for the seconds, print how many were finished."""
    side, address, start, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
    deadline = start + seconds
    if side == "lattice":
        from benchmarks import lattice_side
        from lattice_client import LatticeClient

        with LatticeClient(address) as client:
            lattice_side.one(client)
            time.sleep(max(0.0, start - time.time()))
            print(lattice_side.chains_until(client, deadline))
        return
    import ray

    from benchmarks import ray_side

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    caller = ray_side.Tasks() if side == "ray tasks" else ray_side.Actors(1)
    ray_side.one(caller)
    time.sleep(max(0.0, start - time.time()))
    print(ray_side.chains_until(caller, deadline))


if __name__ == "__main__":
    main()
