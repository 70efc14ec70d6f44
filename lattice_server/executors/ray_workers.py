"""Owns the reservations in Ray and the worker in each of them.

Rule: a reservation has one worker at a time; a worker that dies is replaced until the reservation is released.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from lattice_server import background
from lattice_server.config import ServerConfig
from lattice_server.core.messages import SchedulerEvent, WorkerLost
from lattice_server.engine.ports import Contact
from lattice_server.executors.processes import MARK, end_orphans
from lattice_server.executors.ray_reservation import TOKEN, Reservation, own_reservations
from lattice_server.executors.worker_command import log_flags, worker_flags

log = logging.getLogger(__name__)

MAX_GIVEN_UP = 1000


class RayWorkers:
    """All reservations of one server; lives on the main thread.

    `order` sends an order to Ray's driver, `post` takes events for the scheduler, and `on_release` is called with each
    reservation that is released.
    """

    def __init__(
        self,
        config: ServerConfig,
        contact: Contact,
        order: Callable[..., None],
        post: Callable[[Sequence[SchedulerEvent]], None],
        on_release: Callable[[Reservation], None],
    ) -> None:
        self._config = config
        self._contact = contact
        self._order_driver = order
        self._post = post
        self._on_release = on_release
        self._reservations: dict[str, Reservation] = {}
        self._given_up: deque[str] = deque(maxlen=MAX_GIVEN_UP)
        self._change = asyncio.Event()
        self._is_stopping = False

    def begin(self, total: dict[str, float], store_directory: Path) -> None:
        """Add the server's own reservations in a Ray that has `total` resources."""
        own = own_reservations(self._config, self._contact, total, store_directory)
        self._reservations.update({reservation.key: reservation for reservation in own})

    def reserve_all(self) -> None:
        """Make every reservation in a Ray that has just started."""
        for reservation in self._reservations.values():
            self._reserve(reservation)

    def add(self, reservation: Reservation) -> None:
        """Make a new reservation."""
        self._reservations[reservation.key] = reservation
        self._reserve(reservation)

    def take(self, event: dict[str, Any]) -> None:
        """Take an event of a worker: it was placed, or it ended."""
        reservation = self._reservations.get(event["key"])
        if reservation is None or reservation.worker_id != event["worker_id"]:
            return
        if event["event"] == "placed":
            reservation.placed_at = asyncio.get_running_loop().time()
        else:
            background.start(self._end(reservation, event["status"], event["reason"]), self._contact.on_failure)

    def has_given_up(self, worker_id: str) -> bool:
        """Whether the scheduler was told that a worker is lost."""
        return worker_id in self._given_up

    def give_up(self, reservation: Reservation, reason: str) -> None:
        """Tell the scheduler that the worker of a reservation is lost."""
        self._given_up.append(reservation.worker_id)
        self._post([WorkerLost(reservation.worker_id, reason)])

    def release(self, reservation: Reservation) -> None:
        """Release a reservation, and revoke the token of its worker."""
        self._reservations.pop(reservation.key, None)
        reservation.cancel_restart()
        self._order("release", reservation)
        if (token := reservation.environment.get(TOKEN)) is not None:
            self._contact.revoke(token)
        self._on_release(reservation)

    async def lose_all(self, reason: str) -> None:
        """Give up every worker, because Ray is gone; the reservations stay, for the next Ray."""
        for reservation in list(self._reservations.values()):
            reservation.cancel_restart()
            if reservation.is_placed and reservation.store_directory is not None:
                await asyncio.to_thread(end_orphans, reservation.worker_id)
            self.give_up(reservation, reason)
            reservation.placed_at = None

    async def all_ended(self) -> None:
        """Wait until no worker is placed any more; from now on none is replaced."""
        self._is_stopping = True
        while any(reservation.is_placed for reservation in self._reservations.values()):
            self._change.clear()
            await self._change.wait()

    def _reserve(self, reservation: Reservation) -> None:
        self._order("reserve", reservation, bundle=reservation.bundle)
        self._serve(reservation)

    def _serve(self, reservation: Reservation) -> None:
        worker_id = reservation.worker_id = f"ray-{uuid4().hex[:12]}"
        reservation.cancel_restart()
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
        """Release the reservation of a worker that left by itself; replace a worker that died."""
        worker_id = reservation.worker_id
        about = {"worker_id": worker_id, "node_id": reservation.node_id}
        if reservation.store_directory is not None:
            # The actor ends them unless it was killed itself; on other machines this server could not.
            await asyncio.to_thread(end_orphans, worker_id)
        is_current = self._reservations.get(reservation.key) is reservation and reservation.worker_id == worker_id
        if self._is_stopping:
            reservation.placed_at = None
        elif is_current and status == 0:
            log.info("the worker left", extra=about)
            reservation.placed_at = None
            self.release(reservation)
        elif is_current:
            log.warning("the worker is gone: %s; starting another", reason, extra=about)
            self.give_up(reservation, reason)
            loop = asyncio.get_running_loop()
            reservation.restart = loop.call_later(reservation.lose(loop.time()), self._serve, reservation)
        self._change.set()

    def _order(self, do: str, reservation: Reservation, **details: Any) -> None:
        self._order_driver(do=do, key=reservation.key, **details)
