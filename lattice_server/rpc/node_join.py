"""Serves the streams of machines that joined: those on which Ray starts the workers.

Rule: a machine is part of the cluster for as long as its stream lives, and is told why when it no longer is.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from lattice.v1 import worker_pb2

from lattice_server.config import ServerConfig
from lattice_server.core.errors import InvalidError
from lattice_server.core.messages import DrainRequested
from lattice_server.engine.bus import MessageBus
from lattice_server.engine.ports import Executor, Machine, Membership
from lattice_server.engine.queries import SchedulerQueries
from lattice_server.rpc import callers
from lattice_server.rpc.callers import Caller, no_longer_valid
from lattice_server.rpc.convert import payloads
from lattice_server.rpc.hello_validation import deadline_from_proto

HANG_UP_S = 2.0
REASONS = {
    "DRAINED": "the node was drained",
    "SHUTDOWN": "the cluster starts anew; join again",
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
        """Return the subject whose machine a node is; None when no machine of that name is there."""
        return next(iter(self._owners.get(node_id, ())), None)

    def has_given_up(self, worker_id: str) -> bool:
        """Whether a worker must not be let in, because it was given up."""
        return self._executor.has_given_up(worker_id)

    async def serve(self, join: worker_pb2.Join, requests: Requests) -> AsyncGenerator[worker_pb2.ConnectResponse]:
        """Take a machine in and hold its stream."""
        caller = callers.caller()
        machine = Machine(
            join.node_id,
            join.hostname,
            join.node_ip,
            payloads.capacity_from_proto(join.capacity),
            dict(join.labels),
            caller.subject,
        )
        self._owners.setdefault(machine.node_id, []).append(caller.subject)
        try:
            membership = await self._executor.join(machine)
            async with contextlib.aclosing(self._hold(machine, membership, caller, requests)) as responses:
                async for response in responses:
                    yield response
        finally:
            self._owners[machine.node_id].remove(caller.subject)
            if not self._owners[machine.node_id]:
                del self._owners[machine.node_id]

    async def _hold(
        self, machine: Machine, membership: Membership, caller: Caller, requests: Requests
    ) -> AsyncGenerator[worker_pb2.ConnectResponse]:
        def end() -> None:
            if not membership.over.done():
                membership.over.set_result("UNAUTHENTICATED")

        caller.ends.add(end)
        reading = asyncio.create_task(self._read(machine.node_id, requests, membership))
        waits: set[asyncio.Future[Any]] = {reading, membership.over}
        try:
            yield worker_pb2.ConnectResponse(joined=self._joined(membership))
            while membership.ray is not None:
                beat_s = self._config.heartbeat_interval_s
                await asyncio.wait(waits, timeout=beat_s, return_when=asyncio.FIRST_COMPLETED)
                if membership.over.done():
                    reason = membership.over.result()
                    code = worker_pb2.CloseReason.Value(f"CLOSE_REASON_{reason}")
                    yield worker_pb2.ConnectResponse(close=worker_pb2.Close(reason=code, message=REASONS[reason]))
                    break
                if reading.done():
                    return
                # A message without a field is a sign of life.
                yield worker_pb2.ConnectResponse()
            # The machine hangs up when it has read the last word; ending first could lose it.
            await asyncio.wait({reading}, timeout=HANG_UP_S)
        finally:
            caller.ends.discard(end)
            reading.cancel()
            if membership.ray is not None:
                self._executor.leave(machine.node_id, membership)

    def _joined(self, membership: Membership) -> worker_pb2.Joined:
        ray = membership.ray
        return worker_pb2.Joined(
            ray=None
            if ray is None
            else worker_pb2.RayCluster(
                address=ray.address, token=ray.token, resource=ray.resource, version=ray.version
            ),
            heartbeat_interval=payloads.duration(self._config.heartbeat_interval_s),
            silence_limit=payloads.duration(self._config.silence_limit_s),
        )

    async def _read(self, node_id: str, requests: Requests, membership: Membership) -> None:
        """Read until the stream breaks, ends, falls silent or cannot be read."""
        with contextlib.suppress(grpc.RpcError, TimeoutError, StopAsyncIteration, DecodeError, InvalidError):
            while True:
                async with asyncio.timeout(self._config.silence_limit_s):
                    request = await anext(requests)
                if request.HasField("draining"):
                    await self._drain(node_id, request.draining, membership)

    async def _drain(self, node_id: str, draining: worker_pb2.Draining, membership: Membership) -> None:
        known = (await self._queries.nodes()).nodes
        if any(node.node_id == node_id for node in known):
            self._bus.post([DrainRequested(node_id, deadline_from_proto(draining))])
        elif not membership.over.done():
            # Its worker has not come yet, or is gone: nothing runs there.
            membership.over.set_result("DRAINED")
