"""The figures of a soak: memory, descriptors and threads of each kind of process, the store's files, the store's
counts, and whether each is flat.

A figure is flat when the line through its samples, once the load has settled, rises by no more than its tolerance from
the first to the last.
"""

import asyncio
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil
from lattice.v1 import cluster_pb2, cluster_pb2_grpc

MIB = 1024 * 1024
SHARE = 0.05
# By the last word of a figure's name: the rise that is always allowed.
TOLERANCES = {"MiB": 8.0, "descriptors": 16.0, "threads": 4.0, "files": 40.0, "processes": 4.0, "items": 40.0}


@dataclass
class Sample:
    """The figures at one time, in seconds since the start."""

    at_s: float
    figures: dict[str, float] = field(default_factory=dict)


class Sampler:
    """Samples a server, its processes and its store. A worker is a child of the server; runners descend from it."""

    def __init__(self, pid: int, store: Path, channel: grpc.aio.Channel) -> None:
        self._server = psutil.Process(pid)
        self._store = store
        self._cluster = cluster_pb2_grpc.ClusterServiceStub(channel)  # type: ignore[no-untyped-call]
        self._started = time.monotonic()
        self.samples: list[Sample] = []

    async def go_on(self, every_s: float) -> None:
        """Sample for ever."""
        while True:
            self.samples.append(await self._sample())
            if len(self.samples) % 12 == 1:
                print(_line(self.samples[-1]), flush=True)
            # It samples at times, not upon events.
            await asyncio.sleep(every_s)

    async def _sample(self) -> Sample:
        sample = Sample(time.monotonic() - self._started)
        figures = sample.figures
        agents = self._server.children()
        runners = [child for agent in agents for child in agent.children(recursive=True)]
        for name, processes in (("server", [self._server]), ("agent", agents), ("runner", runners)):
            memory, descriptors, threads = [0.0], 0, 0
            for process in processes:
                with suppress(psutil.Error):
                    memory.append(process.memory_info().rss / MIB)
                    descriptors += process.num_fds()
                    threads += process.num_threads()
            figures[f"{name} MiB"] = sum(memory)
            figures[f"{name} descriptors"] = descriptors
            figures[f"{name} threads"] = threads
            if name == "runner":
                figures["largest runner MiB"] = max(memory)
                figures["runner processes"] = len(processes)
        files = list(_files(self._store))
        figures["store files"] = len(files)
        figures["store MiB"] = sum({entry.st_ino: entry.st_blocks * 512 for entry in files}.values()) / MIB
        info = await self._cluster.GetServerInfo(cluster_pb2.GetServerInfoRequest())
        figures |= {f"{store.name} MiB": store.used_bytes / MIB for store in info.stores}
        figures["client MiB"] = psutil.Process().memory_info().rss / MIB
        return sample


def _files(folder: Path) -> Iterator[os.stat_result]:
    for directory, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                yield os.lstat(os.path.join(directory, name))


def report(samples: list[Sample], settle_s: float, output: Path | None) -> bool:
    """Print the figures and whether each is flat; return whether all are."""
    if output is not None:
        output.write_text(json.dumps([{"at_s": sample.at_s, **sample.figures} for sample in samples]))
    settled = [sample for sample in samples if sample.at_s >= settle_s]
    if len(settled) < 3:
        print("too short to say whether anything grows")
        return False
    is_flat = True
    print(f"{'figure':28}{'first':>9}{'settled':>9}{'last':>9}{'most':>9}{'rise':>9}{'an hour':>9}")
    for name in settled[0].figures:
        values = [sample.figures.get(name, 0.0) for sample in settled]
        slope = statistics.linear_regression([sample.at_s for sample in settled], values).slope
        rise = slope * (settled[-1].at_s - settled[0].at_s)
        allowed = max(SHARE * statistics.fmean(values), TOLERANCES[name.rpartition(" ")[2]])
        verdict = "" if rise <= allowed else "  grows"
        is_flat = is_flat and not (verdict and not name.startswith("client"))
        shown = (samples[0].figures.get(name, 0.0), values[0], values[-1], max(values), rise, slope * 3600)
        print(f"{name:28}" + "".join(f"{value:9.1f}" for value in shown) + verdict)
    print("flat" if is_flat else "not flat")
    return is_flat


def _line(sample: Sample) -> str:
    shown = ", ".join(f"{name} {value:.0f}" for name, value in sample.figures.items())
    return f"{sample.at_s:5.0f} s: {shown}"
