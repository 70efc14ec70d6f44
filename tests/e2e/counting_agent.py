"""An agent that counts the packets between it and its runners. On SIGUSR1 it prints the counts and begins anew."""

import os

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # As `python -m lattice_worker`; read when gRPC is imported.

import json
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from lattice_worker.cli import main
from lattice_worker.pool import control_socket

counts: Counter[str] = Counter()
joined = control_socket.joined


def counting_joined(packets: Iterable[bytes]) -> Iterator[bytes]:
    for packet in joined(packets):
        counts["sent"] += 1
        yield packet


class CountingAssembler(control_socket.Assembler):
    def feed(self, packet: bytes) -> Any:
        counts["received"] += 1
        return super().feed(packet)


def tell(*_: object) -> None:
    print(json.dumps(counts), flush=True)
    counts.clear()


if __name__ == "__main__":
    control_socket.joined = counting_joined
    control_socket.Assembler = CountingAssembler  # type: ignore[misc]
    signal.signal(signal.SIGUSR1, tell)
    main()
