"""The Ray node of a machine, with a program in Ray's place: how it is started, again and again, and ended."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from lattice.v1 import worker_pb2

from lattice_worker.config import WorkerConfig
from lattice_worker.machine import ray_node
from lattice_worker.machine.ray_node import RayNode

TIMEOUT_S = 30.0
CLUSTER = worker_pb2.RayCluster(address="127.0.0.1:6379", token="Ray's", resource="lattice-node-m")
# Starts a child, writes how it was started, and notes when it is asked to end; the child is not asked.
RAY = """
import json, os, signal, subprocess, sys
folder = FOLDER
def asked(*_):
    open(f"{folder}/asked", "w").close()
    if WILLING:
        os._exit(0)
signal.signal(signal.SIGTERM, asked)
child = subprocess.Popen(["sleep", "600"])
told = {"argv": sys.argv[1:], "environment": dict(os.environ), "pids": [os.getpid(), child.pid]}
with open(f"{folder}/told.new", "w") as file:
    json.dump(told, file)
os.rename(f"{folder}/told.new", f"{folder}/told")
while True:
    signal.pause()
"""


class Scene:
    """A Ray node, and the notes of the program in Ray's place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        config = WorkerConfig("head:1", "w", "m", str(folder), num_cpus=2.9, num_gpus=1)
        self.node = RayNode(config, CLUSTER)

    async def told(self) -> dict[str, Any]:
        """Wait until the program was started; return its notes."""
        path = self._folder / "told"
        while not path.exists():
            await asyncio.sleep(0.01)
        told: dict[str, Any] = json.loads(path.read_text())
        path.unlink()
        return told

    @property
    def was_asked(self) -> bool:
        """Whether it was asked to end."""
        return (self._folder / "asked").exists()


@asynccontextmanager
async def started(folder: Path) -> AsyncIterator[Scene]:
    """A node that was started; it is stopped after the block."""
    async with asyncio.timeout(TIMEOUT_S):
        scene = Scene(folder)
        scene.node.start()
        yield scene
        await scene.node.stop(at_once=True)


def play(
    scenario: Callable[[Scene], Coroutine[Any, Any, None]],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_willing: bool = True,
) -> None:
    """Play a scenario with a program that ends when it is asked to if it `is_willing`."""
    program = RAY.replace("FOLDER", repr(str(folder))).replace("WILLING", str(is_willing))
    monkeypatch.setattr(ray_node, "RAY", program)
    monkeypatch.setattr(ray_node, "RESTART_S", 0.0)

    async def scene() -> None:
        async with started(folder) as found:
            await scenario(found)

    asyncio.run(scene())


def alive(pids: list[int]) -> list[int]:
    """Return the processes that run."""
    found = []
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
        except psutil.NoSuchProcess:
            pass
    return found


async def until_gone(pids: list[int]) -> None:
    while alive(pids):
        await asyncio.sleep(0.01)


def test_ray_is_given_the_capacity_and_the_address_of_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[str] = []
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")

    async def scenario(scene: Scene) -> None:
        told = await scene.told()
        parent, *words = told["argv"]
        assert int(parent) == os.getpid()
        flags = dict(zip(words[1:-2:2], words[2:-2:2], strict=True))
        assert flags["--address"] == CLUSTER.address
        assert Path(flags["--temp-dir"]).is_dir()
        folders.append(flags["--temp-dir"])
        assert (flags["--num-cpus"], flags["--num-gpus"]) == ("2", "1")
        assert json.loads(flags["--resources"]) == {CLUSTER.resource: 1}
        environment = told["environment"]
        assert "RAY_ADDRESS" not in environment
        assert environment["LATTICE_TARGET"] == "head:1"
        assert (environment["RAY_AUTH_MODE"], environment["RAY_AUTH_TOKEN"]) == ("token", CLUSTER.token)
        assert scene.node.is_of(worker_pb2.RayCluster.FromString(CLUSTER.SerializeToString()))
        assert not scene.node.is_of(worker_pb2.RayCluster(address=CLUSTER.address, resource=CLUSTER.resource))

    play(scenario, tmp_path, monkeypatch)
    assert not Path(folders[0]).exists()


def test_it_is_started_again_whenever_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene) -> None:
        for _ in range(2):
            first, child = (await scene.told())["pids"]
            psutil.Process(first).kill()
            psutil.Process(child).kill()
        await scene.told()

    play(scenario, tmp_path, monkeypatch)


@pytest.mark.parametrize("is_willing", [True, False])
def test_when_it_is_stopped_it_may_end_by_itself_first(
    is_willing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_node, "STOP_S", TIMEOUT_S if is_willing else 0.1)

    async def scenario(scene: Scene) -> None:
        pids = (await scene.told())["pids"]
        await scene.node.stop()
        assert scene.was_asked
        await until_gone(pids[:1] if is_willing else pids)
        if is_willing:
            psutil.Process(pids[1]).kill()
        assert not (tmp_path / "told").exists()
        await scene.node.stop()

    play(scenario, tmp_path, monkeypatch, is_willing=is_willing)


def test_when_its_cluster_is_gone_it_is_ended_at_once_with_all_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(scene: Scene) -> None:
        pids = (await scene.told())["pids"]
        await scene.node.stop(at_once=True)
        assert not scene.was_asked
        await until_gone(pids)

    play(scenario, tmp_path, monkeypatch)
