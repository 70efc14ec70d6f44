"""The child process of Ray's driver, played by another program: its orders and events, and its complete end."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest

from lattice_server.config import ServerConfig
from lattice_server.executors import ray_driver_client as module
from lattice_server.executors.ray_driver_client import PRIVATE, TUNING, RayChild, ray_child

TIMEOUT_S = 30.0
# Tells how it was started, with something beside it that has nothing to do with it any more, and repeats its orders.
DRIVER = f"""#!{sys.executable}
import json, os, subprocess, sys, time
beside = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
pids = [os.getpid(), beside.pid]
print(json.dumps({{"event": "told", "argv": sys.argv[1:], "pids": pids, "environment": dict(os.environ)}}), flush=True)
for line in sys.stdin:
    print(json.dumps({{"event": "ordered", "order": json.loads(line)}}), flush=True)
time.sleep(LINGER_S)
"""


def play(
    scenario: Callable[[RayChild], Coroutine[Any, Any, None]],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    linger_s: float = 0.0,
    **settings: Any,
) -> None:
    """Play a scenario with a driver that ends `linger_s` after it should."""
    program = folder / "driver"
    program.write_text(DRIVER.replace("LINGER_S", str(linger_s)))
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))

    async def scene() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            child = ray_child(ServerConfig(**settings), "Ray's")
            try:
                await scenario(child)
            finally:
                await child.stop()

    asyncio.run(scene())


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_driver_hears_its_settings_first_and_nothing_it_has_no_use_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in PRIVATE:
        monkeypatch.setenv(name, "private")
    known, *others = TUNING
    monkeypatch.setenv(known, "as the user says")

    async def scenario(child: RayChild) -> None:
        events = child.events()
        environment = (await anext(events))["environment"]
        assert not set(PRIVATE) & set(environment)
        assert environment[known] == "as the user says"
        assert {name: environment[name] for name in others} == {name: TUNING[name] for name in others}
        assert environment["RAY_AUTH_TOKEN"] == "Ray's"
        settings = (await anext(events))["order"]
        assert (settings["address"], settings["node_ip"], settings["num_cpus"]) == ("local", "127.0.0.1", 0)
        assert settings["num_gpus"] == 0, "whoever offers no CPUs offers nothing"
        child.order(do="release", key="k")
        assert (await anext(events))["order"] == {"do": "release", "key": "k"}

    play(scenario, tmp_path, monkeypatch, num_cpus=0)


def test_a_ray_that_is_not_the_servers_own_is_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TUNING, "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    async def scenario(child: RayChild) -> None:
        events = child.events()
        environment = (await anext(events))["environment"]
        assert not {*TUNING, "RAY_AUTH_TOKEN"} & set(environment)
        assert (await anext(events))["order"]["address"] == "10.0.0.9:6379"

    play(scenario, tmp_path, monkeypatch, ray_address="10.0.0.9:6379")


@pytest.mark.parametrize("linger_s", [0.0, 600.0])
def test_all_that_a_driver_started_ends_with_it(
    linger_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_S", TIMEOUT_S if not linger_s else 0.1)

    async def scenario(child: RayChild) -> None:
        await child.stop()  # there is nothing yet
        events = child.events()
        pids = (await anext(events))["pids"]
        await child.stop()
        assert not [pid for pid in pids if is_alive(pid)]
        child.order(do="release", key="k")
        assert [event["event"] async for event in events] == ["ordered"]

    play(scenario, tmp_path, monkeypatch, linger_s)


def test_orphans_of_a_killed_driver_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(child: RayChild) -> None:
        events = child.events()
        driver, beside = (await anext(events))["pids"]
        psutil.Process(driver).kill()
        assert [event["event"] async for event in events][1:] == []
        assert is_alive(beside)
        await child.stop()
        assert not is_alive(beside)

    play(scenario, tmp_path, monkeypatch)
