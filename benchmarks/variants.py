"""The workloads W1 and W3 with other functions, inputs and connections, each compared with the plain ones."""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import trustme

from benchmarks.lattice_side import APART, gather, noop
from benchmarks.serving import served
from lattice_client import LatticeClient, task

TOKEN = "a-token-for-a-benchmark"
WIDTH = 1000
INPUTS: dict[str, Any] = {
    "1 KB of JSON": {"text": "x" * 1000},
    "numpy array of 1 KB": np.arange(128),
}
Variants = dict[str, dict[str, float]]
_numbers = count()


def measure(client: LatticeClient, cpus: int, rounds: int) -> Variants:
    """Return the medians in seconds of W1 and W3 by variant. The variants take turns within every round."""
    with tempfile.TemporaryDirectory() as folder:
        ca, flags = _certificates(Path(folder))
        # Both on the local executor: two servers on Ray would compete for its workers.
        base = ("--executor", "local", "--num-cpus", str(cpus))
        with (
            served(*base) as (plain, _),
            served(*base, *flags, env={"LATTICE_TOKEN": TOKEN}) as (safe, _),
            LatticeClient(plain) as local,
            LatticeClient(safe, tls_ca=ca, token=TOKEN) as secured,
        ):
            sides: dict[str, Callable[[], tuple[Any, Any, LatticeClient]]] = {
                "plain": lambda: (noop, 1, client),
                "another function each time": lambda: (_another(), 1, client),
                **{name: lambda value=value: (noop, value, client) for name, value in INPUTS.items()},
                "plain, local executor": lambda: (noop, 1, local),
                "TLS and a token, local executor": lambda: (noop, 1, secured),
            }
            return _medians(sides, rounds)


def _medians(sides: dict[str, Callable[[], tuple[Any, Any, LatticeClient]]], rounds: int) -> Variants:
    samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in range(-1, rounds):  # round -1 warms up
        for name, side in sides.items():
            for _ in range(20):
                seconds = _one(*side())
                if number >= 0:
                    samples[name]["W1"].append(seconds)
            seconds = _fan(*side())
            if number >= 0:
                samples[name]["W3"].append(seconds)
    return {name: {key: statistics.median(found) for key, found in kinds.items()} for name, kinds in samples.items()}


def _another() -> Any:
    number = next(_numbers)

    @task(exclude=APART)
    def another(x: Any) -> Any:
        return x if number >= 0 else None

    return another


def _one(function: Any, value: Any, client: LatticeClient) -> float:
    started = time.perf_counter()
    workflow = client.create_workflow()
    workflow.add_task(function, {"x": value})
    workflow.run().result()
    return time.perf_counter() - started


def _fan(function: Any, value: Any, client: LatticeClient) -> float:
    started = time.perf_counter()
    workflow = client.create_workflow()
    middle = [workflow.add_task(function, {"x": value}).output for _ in range(WIDTH)]
    workflow.add_task(gather, {"values": middle})
    workflow.run().result()
    return time.perf_counter() - started


def _certificates(folder: Path) -> tuple[str, list[str]]:
    """Make certificates; return the file of the authority, and the flags of the server."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1", "localhost")
    ca, cert, key = folder / "ca.pem", folder / "cert.pem", folder / "key.pem"
    authority.cert_pem.write_to_path(ca)
    cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(key)
    return str(ca), ["--tls-cert", str(cert), "--tls-key", str(key)]
