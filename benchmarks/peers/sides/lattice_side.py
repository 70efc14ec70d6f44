"""Lattice, with the local executor."""

from collections.abc import Iterator
from contextlib import contextmanager

import side

from benchmarks import lattice_side
from benchmarks.serving import served
from lattice_client import LatticeClient


@contextmanager
def started(cpus: int) -> Iterator[side.Workloads]:
    """Run a server with workers on this machine."""

    def one() -> object:
        workflow = client.create_workflow()
        workflow.add_task(lattice_side.noop, {"x": 1})
        return workflow.run().result()["result"]

    def chain() -> object:
        workflow = client.create_workflow()
        last = workflow.add_task(lattice_side.noop, {"x": 1})
        for _ in range(side.LENGTH - 1):
            last = workflow.add_task(lattice_side.noop, {"x": last.output})
        return workflow.run().result()["result"]

    def fan() -> object:
        workflow = client.create_workflow()
        first = workflow.add_task(lattice_side.noop, {"x": 1})
        middle = [workflow.add_task(lattice_side.noop, {"x": first.output}).output for _ in range(side.WIDTH)]
        workflow.add_task(lattice_side.gather, {"values": middle})
        return workflow.run().result()["result"]

    with (
        served("--executor", "local", "--num-cpus", str(cpus)) as (address, _),
        LatticeClient(address) as client,
    ):
        yield {"W1": one, "W2": chain, "W3": fan}


if __name__ == "__main__":
    side.run(started, "lattice-control-plane", "grpcio")
