"""Owns the machines that joined the server's Ray.

Rule: a machine that leaves has some time to join again before its reservation is released.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass, field

from lattice_server.config import ServerConfig
from lattice_server.engine.ports import Contact, Machine
from lattice_server.executors.ray_reservation import Reservation, bundle_of, resource_of, way_from_afar
from lattice_server.executors.ray_workers import RayWorkers
from lattice_server.executors.worker_command import offer_of_machine

# A reservation that waits costs little; a new one costs the start of a worker.
AWAY_S = 30.0


@dataclass(slots=True)
class _Member:
    """A machine that joined: its reservation, its subject, and the futures of its streams."""

    reservation: Reservation
    subject: str = ""
    waiting: list[asyncio.Future[str]] = field(default_factory=list)
    expiry: asyncio.TimerHandle | None = None

    def end(self, reason: str) -> None:
        """Tell the machine that it is no longer needed, and why."""
        for over in self.waiting:
            if not over.done():
                over.set_result(reason)
        self.waiting.clear()


class RayMembers:
    """The machines by node; lives on the main thread."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._members: dict[str, _Member] = {}
        self._streams: Counter[str] = Counter()  # By node; they overlap when a machine joins again.

    def join(self, machine: Machine, over: asyncio.Future[str], workers: RayWorkers, contact: Contact) -> str:
        """Reserve all of a machine, unless its reservation is still there; return the name of its Ray resource."""
        resource = resource_of(machine.node_id)
        offer = offer_of_machine(machine.capacity, machine.labels)
        member = self._members.get(machine.node_id)
        if member is not None and (member.reservation.offer != offer or member.subject != machine.subject):
            self._expire(member, workers)
            member = None
        if member is None:
            reservation = Reservation(
                resource,
                machine.node_id,
                bundle_of(machine.capacity.cpu, len(machine.capacity.gpus), resource),
                offer,
                *way_from_afar(self._config, contact, machine.node_id, machine.subject),
                follows_node=True,
            )
            member = self._members[machine.node_id] = _Member(reservation, machine.subject)
            workers.add(reservation)
        self._streams[machine.node_id] += 1
        member.waiting.append(over)
        if member.expiry is not None:
            member.expiry.cancel()
        return resource

    def leave(self, node_id: str, over: asyncio.Future[str], workers: RayWorkers) -> None:
        """Note that a stream of a machine has ended."""
        self._streams -= Counter([node_id])
        member = self._members.get(node_id)
        if member is not None and over in member.waiting:
            member.waiting.remove(over)
        if member is not None and over.done() and over.result() == "UNAUTHENTICATED":
            self._expire(member, workers)
        elif member is not None and not self._streams[node_id]:
            loop = asyncio.get_running_loop()
            member.expiry = loop.call_later(AWAY_S, self._expire, member, workers)

    def note_release(self, reservation: Reservation) -> None:
        """Tell the machine of a reservation, if it has one, that it was released."""
        member = self._members.get(reservation.node_id)
        if member is not None and member.reservation is reservation:
            del self._members[reservation.node_id]
            if member.expiry is not None:
                member.expiry.cancel()
            member.end("DRAINED")

    def restart_all(self) -> None:
        """Have every machine join again, because Ray is gone."""
        for member in self._members.values():
            member.end("SHUTDOWN")

    def _expire(self, member: _Member, workers: RayWorkers) -> None:
        workers.give_up(member.reservation, "its machine left")
        workers.release(member.reservation)
