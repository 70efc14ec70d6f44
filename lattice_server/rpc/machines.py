"""Serves the streams of machines that joined, on which Ray starts the workers.

Rule: a machine belongs to the cluster while its stream is open, and `Close` says why the stream ends.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from lattice.v1 import worker_pb2

from lattice_server import background
from lattice_server.config import ServerConfig
from lattice_server.core.errors import InvalidError
from lattice_server.core.messages import DrainRequested
from lattice_server.engine.bus import MessageBus
from lattice_server.engine.ports import Executor, Machine, Membership
from lattice_server.engine.queries import SchedulerQueries
from lattice_server.rpc import callers
from lattice_server.rpc.callers import Caller, no_longer_valid
from lattice_server.rpc.convert.times import drain_deadline_from_proto
from lattice_server.rpc.convert.workers import joined_to_proto, machine_from_proto
from lattice_server.rpc.handlers import PEER_END_S

REASONS = {
    "DRAINED": "the node was drained",
    "SHUTDOWN": "the cluster restarts; join again",
    "UNAUTHENTICATED": no_longer_valid().message,
}

Requests = AsyncIterator[worker_pb2.ConnectRequest]


class Machines:
    """The machines that joined; lives on the main thread."""

    def __init__(self, config: ServerConfig, executor: Executor, bus: MessageBus, queries: SchedulerQueries) -> None:
        self._config = config
        self._executor = executor
        self._bus = bus
        self._queries = queries
        self._owners: dict[str, list[str]] = {}  # By node, a subject for each stream.

    def owner_of(self, node_id: str) -> str | None:
        """Return the subject that joined a machine as this node; None without such a machine."""
        return next(iter(self._owners.get(node_id, ())), None)

    def has_given_up(self, worker_id: str) -> bool:
        """Whether a worker is refused because it counts as lost."""
        return self._executor.has_given_up(worker_id)

    async def serve(self, join: worker_pb2.Join, requests: Requests) -> AsyncGenerator[worker_pb2.ConnectResponse]:
        """Add a machine to the cluster and serve its stream."""
        caller = callers.caller()
        machine = machine_from_proto(join, caller.subject)
        self._owners.setdefault(machine.node_id, []).append(caller.subject)
        try:
            membership = await self._executor.join(machine)
            async with contextlib.aclosing(self._serve(machine, membership, caller, requests)) as responses:
                async for response in responses:
                    yield response
        finally:
            self._owners[machine.node_id].remove(caller.subject)
            if not self._owners[machine.node_id]:
                del self._owners[machine.node_id]

    async def _serve(
        self, machine: Machine, membership: Membership, caller: Caller, requests: Requests
    ) -> AsyncGenerator[worker_pb2.ConnectResponse]:
        def end() -> None:
            if not membership.over.done():
                membership.over.set_result("UNAUTHENTICATED")

        silent_beats, beat_s = 0, self._config.heartbeat_interval_s

        def hear() -> None:
            nonlocal silent_beats
            silent_beats = 0

        caller.ends.add(end)
        # The stream ends with it.
        reading = background.start(self._read(machine.node_id, requests, membership, hear), background.only_log)
        waits: set[asyncio.Future[Any]] = {reading, membership.over}
        try:
            yield worker_pb2.ConnectResponse(joined=joined_to_proto(membership, self._config))
            while membership.ray is not None:
                await asyncio.wait(waits, timeout=beat_s, return_when=asyncio.FIRST_COMPLETED)
                if membership.over.done():
                    reason = membership.over.result()
                    code = worker_pb2.CloseReason.Value(f"CLOSE_REASON_{reason}")
                    yield worker_pb2.ConnectResponse(close=worker_pb2.Close(reason=code, message=REASONS[reason]))
                    break
                # A stall of this thread is one beat, however long it is: messages that came meanwhile are read then.
                silent_beats += 1
                if reading.done() or silent_beats * beat_s > self._config.silence_limit_s:
                    return
                # A message without a field is a heartbeat.
                yield worker_pb2.ConnectResponse()
            await asyncio.wait({reading}, timeout=PEER_END_S)
        finally:
            caller.ends.discard(end)
            reading.cancel()
            if membership.ray is not None:
                self._executor.leave(machine.node_id, membership)

    async def _read(self, node_id: str, requests: Requests, membership: Membership, hear: Callable[[], None]) -> None:
        """Read until the stream breaks, ends or cannot be read; `hear` is called with each message."""
        with contextlib.suppress(grpc.RpcError, DecodeError, InvalidError):
            async for request in requests:
                hear()
                if request.HasField("draining"):
                    await self._drain(node_id, request.draining, membership)

    async def _drain(self, node_id: str, draining: worker_pb2.Draining, membership: Membership) -> None:
        known = (await self._queries.nodes()).nodes
        if any(node.node_id == node_id for node in known):
            self._bus.post([DrainRequested(node_id, drain_deadline_from_proto(draining))])
        elif not membership.over.done():
            # Its worker has not connected yet, or is gone: nothing runs there.
            membership.over.set_result("DRAINED")
