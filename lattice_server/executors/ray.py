"""Has Ray place and start workers. Rule: Ray reserves, places and starts; attempts travel over the workers' streams.

A worker runs inside a placement group's bundle that holds all it offers, so Ray's own books stay true. Ray itself runs
in other processes; when it dies, another is started and everybody comes back.
"""

import asyncio
import contextlib
import logging
import platform
import secrets
from collections import Counter, deque
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

from lattice_server.config import ServerConfig
from lattice_server.core.messages import SchedulerEvent, WorkerLost
from lattice_server.engine.ports import Contact, ExecutorError, Machine, Membership, RayCluster
from lattice_server.executors.orphans import MARK, end_leftovers
from lattice_server.executors.ray_driver_client import RayChild, ray_child
from lattice_server.executors.ray_reservation import (
    TOKEN,
    Member,
    Reservation,
    bundle_of,
    own_reservations,
    resource_of,
    way_from_afar,
)
from lattice_server.executors.worker_command import log_flags, offer_of_machine, worker_flags

log = logging.getLogger(__name__)

LEAVE_S = 5.0
# A reservation that waits costs nothing; one that is made anew costs the start of a worker.
AWAY_S = 30.0
MAX_GIVEN_UP = 1000
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0


class RayExecutor:
    """Starts a Ray or joins one, reserves there, and keeps one worker alive in each reservation."""

    name = "ray"

    def __init__(self, config: ServerConfig, store_directory: Path) -> None:
        self._config = config
        self._store_directory = store_directory
        self._is_owner = not config.ray_address
        self._token = ""
        self._address = ""
        self._is_up = asyncio.Event()
        self._child: RayChild | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._reservations: dict[str, Reservation] = {}
        self._members: dict[str, Member] = {}
        self._given_up: deque[str] = deque(maxlen=MAX_GIVEN_UP)
        self._streams: Counter[str] = Counter()  # By node; they may overlap when a machine comes back.
        self._change = asyncio.Event()
        self._has_begun = False
        self._is_stopping = False

    async def start(self, contact: Contact, post: Callable[[Sequence[SchedulerEvent]], None]) -> None:
        """Start Ray and the workers, again whenever one dies. Raises ExecutorError when Ray cannot start."""
        self._contact, self._post = contact, post
        self._keeper = asyncio.create_task(self._keep())
        up = asyncio.create_task(self._is_up.wait())
        await asyncio.wait({self._keeper, up}, return_when=asyncio.FIRST_COMPLETED)
        up.cancel()
        if self._keeper.done():
            self._keeper.result()

    async def stop(self) -> None:
        """End the workers and the Ray this executor started; leave another's as it was."""
        self._is_stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                while any(reservation.is_placed for reservation in self._reservations.values()):
                    self._change.clear()
                    await self._change.wait()
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper

    def ray_address(self) -> str:
        """Return where Ray's head listens."""
        return self._address

    async def join(self, machine: Machine) -> Membership:
        """Take a machine into Ray, once there is one. In another's Ray it has to serve its node itself."""
        over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if not self._is_owner:
            return Membership(None, over)
        await self._is_up.wait()
        resource = resource_of(machine.node_id)
        offer = offer_of_machine(machine.capacity, machine.labels)
        member = self._members.get(machine.node_id)
        if member is not None and (member.reservation.offer != offer or member.subject != machine.subject):
            self._expire(member)
            member = None
        if member is None:
            reservation = Reservation(
                resource,
                machine.node_id,
                bundle_of(machine.capacity.cpu, len(machine.capacity.gpus), resource),
                offer,
                *way_from_afar(self._config, self._contact, machine.node_id, machine.subject),
                follows_node=True,
            )
            member = self._members[machine.node_id] = Member(reservation, machine.subject)
            self._reservations[resource] = reservation
            self._reserve(reservation)
        self._streams[machine.node_id] += 1
        member.waiting.append(over)
        if member.expiry is not None:
            member.expiry.cancel()
        return Membership(RayCluster(self._address, self._token, resource, _version()), over)

    def leave(self, node_id: str, membership: Membership) -> None:
        """Give up the machine's reservation unless it joins again in time."""
        self._streams -= Counter([node_id])
        member = self._members.get(node_id)
        if member is not None and membership.over in member.waiting:
            member.waiting.remove(membership.over)
        if member is not None and membership.over.done() and membership.over.result() == "UNAUTHENTICATED":
            self._expire(member)
        elif member is not None and not self._streams[node_id]:
            loop = asyncio.get_running_loop()
            member.expiry = loop.call_later(AWAY_S, self._expire, member)

    def has_given_up(self, worker_id: str) -> bool:
        """Whether a worker was given up: it may come back before Ray can end it."""
        return worker_id in self._given_up

    def _expire(self, member: Member) -> None:
        self._give_up(member.reservation, "its machine left")
        self._release(member.reservation)

    # Ray.

    async def _keep(self) -> None:
        """Keep a Ray up."""
        loop = asyncio.get_running_loop()
        backoff_s = 0.0
        while True:
            started = loop.time()
            try:
                reason = await self._run_ray()
            except OSError as error:
                reason = f"its driver could not be started: {error}"
            if not self._has_begun:
                raise ExecutorError(f"{reason}; --verbose shows what Ray writes, --executor local does without Ray")
            log.error("Ray is gone: %s; starting another", reason)
            await self._lose_all(f"Ray is gone: {reason}")
            lived_s = loop.time() - started
            backoff_s = 0.0 if lived_s > MAX_BACKOFF_S else min(MAX_BACKOFF_S, max(MIN_BACKOFF_S, backoff_s * 2))
            # One that cannot even start must not be started in a tight loop.
            await asyncio.sleep(backoff_s)

    async def _run_ray(self) -> str:
        """Run a Ray to its end and return how it ended. Raises OSError."""
        reason = "its driver ended"
        self._token = secrets.token_hex(32)
        child = self._child = ray_child(self._config, self._token)
        try:
            async for event in child.events():
                if event["event"] == "over":
                    reason = event["reason"]
                else:
                    self._take(event)
        finally:
            self._is_up.clear()
            self._address = ""
            await child.stop()
        return reason

    def _take(self, event: dict[str, Any]) -> None:
        if event["event"] == "started":
            self._begin(event["address"], event["total"])
            return
        reservation = self._reservations.get(event["key"])
        if reservation is None or reservation.worker_id != event["worker_id"]:
            return
        if event["event"] == "placed":
            reservation.placed_at = asyncio.get_running_loop().time()
        else:
            ending = asyncio.create_task(self._end(reservation, event["status"], event["reason"]))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    def _begin(self, address: str, total: dict[str, float]) -> None:
        self._address = address
        if not self._has_begun:
            self._has_begun = True
            own = own_reservations(self._config, self._contact, total, self._store_directory)
            self._reservations.update({reservation.key: reservation for reservation in own})
        for reservation in self._reservations.values():
            self._reserve(reservation)
        self._is_up.set()

    # Reservations.

    def _reserve(self, reservation: Reservation) -> None:
        self._order("reserve", reservation, bundle=reservation.bundle)
        self._serve(reservation)

    def _serve(self, reservation: Reservation) -> None:
        worker_id = reservation.worker_id = f"ray-{uuid4().hex[:12]}"
        reservation.wait_no_more()
        node_id, store = reservation.node_id, reservation.store_directory
        offer, server = reservation.offer, self._contact.target
        flags = worker_flags(offer, worker_id=worker_id, node_id=node_id, store_directory=store, server=server)
        flags += log_flags(self._config)
        self._order(
            "serve",
            reservation,
            bundle=reservation.bundle,
            worker_id=worker_id,
            store=reservation.store_name,
            flags=flags,
            target=reservation.target,
            environment={**reservation.environment, MARK: worker_id},
            follows_node=reservation.follows_node,
        )

    async def _end(self, reservation: Reservation, status: int | None, reason: str) -> None:
        """Release the reservation of a worker that was to leave; start another for one that was not."""
        worker_id = reservation.worker_id
        about = {"worker_id": worker_id, "node_id": reservation.node_id}
        if reservation.store_directory is not None:
            # The actor sees to it, unless it was killed. On other machines nobody else could.
            await asyncio.to_thread(end_leftovers, worker_id)
        is_news = self._reservations.get(reservation.key) is reservation and reservation.worker_id == worker_id
        if self._is_stopping:
            reservation.placed_at = None
        elif is_news and status == 0:
            log.info("the worker left", extra=about)
            reservation.placed_at = None
            self._release(reservation)
        elif is_news:
            log.warning("the worker is gone: %s; starting another", reason, extra=about)
            self._give_up(reservation, reason)
            loop = asyncio.get_running_loop()
            reservation.again = loop.call_later(reservation.lost(loop.time()), self._serve, reservation)
        self._change.set()

    def _give_up(self, reservation: Reservation, reason: str) -> None:
        self._given_up.append(reservation.worker_id)
        self._post([WorkerLost(reservation.worker_id, reason)])

    def _release(self, reservation: Reservation) -> None:
        self._reservations.pop(reservation.key, None)
        reservation.wait_no_more()
        self._order("release", reservation)
        if (token := reservation.environment.get(TOKEN)) is not None:
            self._contact.revoke(token)
        member = self._members.get(reservation.node_id)
        if member is not None and member.reservation is reservation:
            del self._members[reservation.node_id]
            if member.expiry is not None:
                member.expiry.cancel()
            member.end("DRAINED")

    async def _lose_all(self, reason: str) -> None:
        for reservation in list(self._reservations.values()):
            reservation.wait_no_more()
            if reservation.is_placed and reservation.store_directory is not None:
                await asyncio.to_thread(end_leftovers, reservation.worker_id)
            self._give_up(reservation, reason)
            reservation.placed_at = None
        for member in self._members.values():
            member.end("SHUTDOWN")

    def _order(self, do: str, reservation: Reservation, **details: Any) -> None:
        if self._child is not None:
            self._child.order(do=do, key=reservation.key, **details)


def _version() -> str:
    """Return what runs Ray here."""
    python = ".".join(platform.python_version_tuple()[:2])
    return f"ray {metadata.version('ray')} on python {python}"
