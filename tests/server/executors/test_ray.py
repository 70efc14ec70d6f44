"""The Ray executor with a driver whose events a test chooses: reservations, their workers, and lost ones."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import pytest

from lattice_server.config import ServerConfig
from lattice_server.core.messages import SchedulerEvent, WorkerLost
from lattice_server.core.model import Capacity
from lattice_server.engine.ports import Contact, ExecutorError, Machine, Membership
from lattice_server.executors import ray, ray_members, ray_reservation
from lattice_server.executors.processes import MARK
from lattice_server.executors.ray import RayExecutor
from lattice_server.executors.ray_reservation import HEAD, resource_of

CONTACT = Contact(
    "unix:/head.sock", "10.0.0.1:50051", lambda node_id, subject: "secret", lambda token: None, lambda error: None
)
TIMEOUT_S = 30.0
AWAY_S = 0.05
TWO = Machine("m", "host", "10.0.0.2", Capacity(2), {})
FOUR = Machine("m", "host", "10.0.0.2", Capacity(4), {})
KEY = resource_of("m")


class Driver:
    """The driver of one Ray."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._orders: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.is_stopped = False

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the events of the test."""
        while (event := await self._events.get()) is not None:
            yield event

    def order(self, **order: Any) -> None:
        """Keep an order for the test."""
        self._orders.put_nowait(order)

    async def stop(self) -> None:
        """Be gone."""
        self.is_stopped = True

    async def ordered(self, do: str, key: str = KEY) -> dict[str, Any]:
        """Return the next order, which has to be this one."""
        order = await self._orders.get()
        assert (order["do"], order["key"]) == (do, key)
        return order

    async def started(self, address: str, cpus: float = 2.0) -> None:
        """Say that Ray is up."""
        self.say("started", address=address, total={"CPU": cpus})

    async def placed(self, worker_id: str) -> None:
        """Say that the machine's worker was started."""
        self.say("placed", key=KEY, worker_id=worker_id, pid=1)
        await settle()

    def say(self, event: str, **details: Any) -> None:
        """Say that something happened."""
        self._events.put_nowait({"event": event, **details})

    def ended(self, worker_id: str, status: int | None, key: str = KEY) -> None:
        """Say that a worker ended."""
        self.say("ended", key=key, worker_id=worker_id, status=status, reason="a reason")

    def end(self) -> None:
        """End without an event."""
        self._events.put_nowait(None)

    @property
    def is_silent(self) -> bool:
        """Whether there are no orders."""
        return self._orders.empty()


class Scene:
    """An executor, the drivers it starts one after the other, and the events it posted to the scheduler."""

    def __init__(self, **settings: Any) -> None:
        config = ServerConfig(**{"num_cpus": 0} | settings)
        self.executor = RayExecutor(config, Path("/store"))
        self.drivers: asyncio.Queue[Driver] = asyncio.Queue()
        self.lost: asyncio.Queue[str] = asyncio.Queue()

    def driver(self, *_: Any) -> Driver:
        """Return a new driver, to the executor and to the test."""
        driver = Driver()
        self.drivers.put_nowait(driver)
        return driver

    def post(self, events: Iterable[SchedulerEvent]) -> None:
        """Keep which workers were lost."""
        for event in events:
            assert isinstance(event, WorkerLost)
            self.lost.put_nowait(event.worker_id)

    async def start(self, address: str = "10.0.0.1:1") -> Driver:
        """Start the executor and its first Ray."""
        starting = asyncio.create_task(self.executor.start(CONTACT, self.post))
        driver = await self.drivers.get()
        await driver.started(address)
        await starting
        return driver

    async def join(self, driver: Driver) -> tuple[Membership, str]:
        """Have the machine join and its worker placed; return the worker's id."""
        membership = await self.executor.join(TWO)
        await driver.ordered("reserve")
        worker_id: str = (await driver.ordered("serve"))["worker_id"]
        await driver.placed(worker_id)
        return membership, worker_id


async def settle() -> None:
    """Let every task run that is ready."""
    for _ in range(10):
        await asyncio.sleep(0)


def play(
    scenario: Callable[[Scene], Coroutine[Any, Any, None]], monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> None:
    """Play a scenario with an executor."""

    async def scene() -> None:
        found = Scene(**settings)
        monkeypatch.setattr(ray, "ray_child", found.driver)
        monkeypatch.setattr(ray, "LEAVE_S", AWAY_S)
        monkeypatch.setattr(ray_members, "AWAY_S", AWAY_S)
        async with asyncio.timeout(TIMEOUT_S):
            await scenario(found)
            await found.executor.stop()

    asyncio.run(scene())


def test_a_machine_that_joins_is_told_how_and_its_worker_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene) -> None:
        driver = await scene.start()
        membership, worker_id = await scene.join(driver)
        assert membership.ray is not None
        assert (membership.ray.address, membership.ray.resource) == ("10.0.0.1:1", KEY)
        driver.ended(worker_id, None)
        assert await scene.lost.get() == worker_id
        again = (await driver.ordered("serve"))["worker_id"]
        assert scene.executor.has_given_up(worker_id)
        assert not scene.executor.has_given_up(again)
        # A late event of the earlier worker does not count for this one.
        driver.ended(worker_id, 0)
        await driver.placed(again)
        driver.ended(again, 1)
        assert await scene.lost.get() == again
        assert not membership.over.done()

    play(scenario, monkeypatch)


def test_a_machine_whose_worker_was_to_leave_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene) -> None:
        driver = await scene.start()
        membership, worker_id = await scene.join(driver)
        driver.ended(worker_id, 0)
        assert await membership.over == "DRAINED"
        await driver.ordered("release")
        scene.executor.leave("m", membership)
        _, other = await scene.join(driver)
        assert other != worker_id
        assert scene.lost.empty()

    play(scenario, monkeypatch)


def test_a_machine_that_does_not_come_back_loses_its_reservation(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene) -> None:
        driver = await scene.start()
        membership, worker_id = await scene.join(driver)
        scene.executor.leave("m", membership)
        await driver.ordered("release")
        assert await scene.lost.get() == worker_id
        # A late event of a worker that was given up.
        driver.ended(worker_id, None)
        await scene.join(driver)
        assert scene.lost.empty()

    play(scenario, monkeypatch)


def test_no_worker_is_started_in_a_reservation_that_was_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene) -> None:
        driver = await scene.start()
        membership, worker_id = await scene.join(driver)
        driver.ended(worker_id, None)
        await scene.lost.get()
        scene.executor.leave("m", membership)
        await driver.ordered("release")
        await asyncio.sleep(2 * ray_reservation.MIN_BACKOFF_S)
        assert driver.is_silent
        driver.end()
        other = await scene.drivers.get()
        await other.started("10.0.0.1:2")
        await settle()
        assert other.is_silent

    play(scenario, monkeypatch)


@pytest.mark.parametrize("is_overlapping", [True, False])
def test_a_machine_that_comes_back_in_time_keeps_its_reservation(
    is_overlapping: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(scene: Scene) -> None:
        driver = await scene.start()
        membership, _ = await scene.join(driver)
        if not is_overlapping:
            scene.executor.leave("m", membership)
        back = await scene.executor.join(TWO)
        if is_overlapping:
            scene.executor.leave("m", membership)
        await asyncio.sleep(3 * AWAY_S)
        assert driver.is_silent
        assert back.ray == membership.ray
        scene.executor.leave("m", back)
        await driver.ordered("release")

    play(scenario, monkeypatch)


def test_a_machine_that_comes_back_with_another_offer_is_reserved_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene) -> None:
        driver = await scene.start()
        membership, worker_id = await scene.join(driver)
        scene.executor.leave("m", membership)
        back = await scene.executor.join(FOUR)
        assert await scene.lost.get() == worker_id
        await driver.ordered("release")
        assert (await driver.ordered("reserve"))["bundle"]["CPU"] == 4.0
        await driver.ordered("serve")
        await asyncio.sleep(3 * AWAY_S)
        assert driver.is_silent, "the end of what it had before was that of what it has now"
        assert not back.over.done()

    play(scenario, monkeypatch)


def test_with_ray_all_is_lost_and_another_ray_is_given_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene) -> None:
        driver = await scene.start()
        membership, worker_id = await scene.join(driver)
        driver.end()
        assert await scene.lost.get() == worker_id
        assert scene.executor.has_given_up(worker_id)
        assert await membership.over == "SHUTDOWN"
        assert driver.is_stopped
        other = await scene.drivers.get()
        joining = asyncio.create_task(scene.executor.join(TWO))
        await settle()
        assert scene.executor.ray_address() == ""
        assert not joining.done(), "there is nothing to join"
        await other.started("10.0.0.1:2")
        await other.ordered("reserve")
        assert (await other.ordered("serve"))["worker_id"] != worker_id
        back = await joining
        assert back.ray is not None
        assert back.ray.address == scene.executor.ray_address() == "10.0.0.1:2"
        assert other.is_silent
        # There is no worker to wait for.
        monkeypatch.setattr(ray, "LEAVE_S", TIMEOUT_S)
        await scene.executor.stop()
        assert scene.lost.empty()

    play(scenario, monkeypatch)


def test_nothing_is_asked_of_a_ray_before_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "MIN_BACKOFF_S", 0.0)

    async def scenario(scene: Scene) -> None:
        driver = await scene.start()
        _, worker_id = await scene.join(driver)
        # Another worker is to be started soon, but there is no Ray any more.
        driver.ended(worker_id, None)
        await scene.lost.get()
        driver.end()
        other = await scene.drivers.get()
        await asyncio.sleep(2 * ray_reservation.MIN_BACKOFF_S)
        assert other.is_silent

    play(scenario, monkeypatch)


def test_a_server_whose_first_ray_does_not_start_does_not_either(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene) -> None:
        starting = asyncio.create_task(scene.executor.start(CONTACT, scene.post))
        driver = await scene.drivers.get()
        driver.say("over", reason="no room")
        driver.end()
        with pytest.raises(ExecutorError, match="no room; --verbose shows what Ray writes"):
            await starting
        assert driver.is_stopped
        assert scene.drivers.empty()

    async def scene() -> None:
        found = Scene()
        monkeypatch.setattr(ray, "ray_child", found.driver)
        async with asyncio.timeout(TIMEOUT_S):
            await scenario(found)

    asyncio.run(scene())


def test_a_server_that_stops_waits_for_its_workers_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene) -> None:
        driver = await scene.start()
        _, worker_id = await scene.join(driver)
        monkeypatch.setattr(ray, "LEAVE_S", TIMEOUT_S)
        stopping = asyncio.create_task(scene.executor.stop())
        await settle()
        assert not driver.is_stopped
        driver.ended(worker_id, 1)
        await stopping
        assert driver.is_stopped
        assert driver.is_silent
        assert scene.lost.empty()

    play(scenario, monkeypatch)


def test_a_machine_serves_its_node_itself_when_ray_is_not_the_servers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene) -> None:
        driver = await scene.start()
        membership = await scene.executor.join(TWO)
        assert membership.ray is None
        assert driver.is_silent

    play(scenario, monkeypatch, ray_address="10.0.0.9:6379")


@pytest.mark.parametrize("victim", ["worker", "Ray"])
def test_orphans_of_a_dead_worker_on_this_machine_are_ended(victim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(scene: Scene) -> None:
        driver = await scene.start()
        await driver.ordered("reserve", HEAD)
        order = await driver.ordered("serve", HEAD)
        worker_id, environment = order["worker_id"], order["environment"]
        assert environment[MARK] == worker_id
        driver.say("placed", key=HEAD, worker_id=worker_id, pid=1)
        left = subprocess.Popen(["sleep", "600"], env=environment)
        if victim == "worker":
            driver.ended(worker_id, None, HEAD)
        else:
            driver.end()
        assert await scene.lost.get() == worker_id
        await asyncio.to_thread(left.wait, TIMEOUT_S)

    play(scenario, monkeypatch, num_cpus=2)
