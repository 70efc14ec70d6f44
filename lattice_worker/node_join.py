"""A machine that joins a cluster: offers its capacity, and starts an agent or a Ray node as the server asks.

Rule: the machine belongs to the server that accepted it last; processes started for another server are ended.
"""

import asyncio
import logging
import random
import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from lattice.v1 import worker_pb2, worker_pb2_grpc

from lattice_worker import convert
from lattice_worker.agent import DIAL_S, MAX_BACKOFF_S, MIN_BACKOFF_S, PROTOCOL_VERSION, VERSION, Agent
from lattice_worker.channel import check_cancelled, opened
from lattice_worker.config import WorkerConfig
from lattice_worker.machine import host
from lattice_worker.machine.ray_node import RayNode, version

log = logging.getLogger(__name__)


class Joiner:
    """One machine that joins. Everything runs on one event loop."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._agent: Agent | None = None
        self._ray: RayNode | None = None
        self._leaving: worker_pb2.Draining | None = None
        self._wake = asyncio.Event()
        self._is_member = False
        self._heartbeat_s = 1.0
        self._complaint = ""
        self.refusal = ""

    async def run(self) -> None:
        """Be part of the cluster until the server releases the machine; `refusal` is the reason if it was refused."""
        backoff_s = MIN_BACKOFF_S
        try:
            while not await self._hold_stream():
                check_cancelled()
                backoff_s = MIN_BACKOFF_S if self._is_member else min(MAX_BACKOFF_S, backoff_s * 2)
                # Random, so that not all machines reconnect at once to a server that was restarted.
                await asyncio.sleep(random.uniform(0, backoff_s))
        finally:
            if self._ray is not None:
                await self._ray.stop()

    def leave(self, deadline_s: float) -> None:
        """Ask the server to drain the machine: leases that still run after `deadline_s` are moved."""
        if self._agent is not None:
            self._agent.leave(deadline_s)
        else:
            deadline = Duration(seconds=int(deadline_s), nanos=int(deadline_s % 1 * 1e9))
            self._leaving = worker_pb2.Draining(deadline=deadline)
            self._wake.set()

    async def _hold_stream(self) -> bool:
        """Serve one stream; return whether the machine is to leave."""
        self._is_member = False
        self._wake = asyncio.Event()
        async with opened(self._config) as channel:
            call = worker_pb2_grpc.WorkerServiceStub(channel).Connect(self._requests(self._wake))
            silence_s = DIAL_S
            try:
                while True:
                    async with asyncio.timeout(silence_s):
                        response: Any = await call.read()
                    self._complaint = ""
                    if response is grpc.aio.EOF:
                        return False
                    if response.HasField("close"):
                        return self._closed(response.close)
                    if not response.HasField("joined"):
                        continue
                    joined = response.joined
                    if not joined.HasField("ray"):
                        break
                    if joined.ray.version not in {"", version()}:
                        needed = joined.ray.version
                        self.refusal = f"its cluster runs {needed}, this machine has {version()}; install the same"
                        return True
                    silence_s = convert.seconds(joined.silence_limit) or DIAL_S
                    await self._start_ray(joined)
            except grpc.aio.AioRpcError as error:
                self._complain(error.details() or error.code().name)
                return False
            except TimeoutError:
                self._complain("nothing was heard")
                return False
            finally:
                call.cancel()
        await self._serve()
        return True

    async def _serve(self) -> None:
        """Run attempts here: the server has no other way to have that done."""
        if self._ray is not None:
            await self._ray.stop()
        self._agent = Agent(self._config)
        if self._leaving is not None:
            return
        self._say_joined()
        await self._agent.run()
        self.refusal = self._agent.refusal

    async def _start_ray(self, joined: worker_pb2.Joined) -> None:
        self._heartbeat_s = convert.seconds(joined.heartbeat_interval) or 1.0
        if self._ray is None or not self._ray.is_of(joined.ray):
            if self._ray is not None:
                await self._ray.stop(at_once=True)
            self._ray = RayNode(self._config, joined.ray)
            self._ray.start()
        if not self._is_member:
            self._say_joined()
        self._is_member = True
        self._wake.set()

    def _complain(self, why: str) -> None:
        """Say once why the server cannot be reached; it is tried again and again."""
        if why != self._complaint:
            log.warning("%s cannot be reached: %s; trying again", self._config.target, why)
        self._complaint = why

    def _say_joined(self) -> None:
        print(f"Joined {self._config.target} as node {self._config.node_id}", flush=True)

    def _closed(self, close: worker_pb2.Close) -> bool:
        reason = convert.close_reason(close)
        log.info("the server closed the stream: %s: %s", reason, close.message)
        if close.reason == worker_pb2.CLOSE_REASON_SHUTDOWN:
            return False
        if close.reason != worker_pb2.CLOSE_REASON_DRAINED:
            self.refusal = f"{reason}: {close.message}"
        return True

    async def _requests(self, wake: asyncio.Event) -> AsyncIterator[worker_pb2.ConnectRequest]:
        yield worker_pb2.ConnectRequest(join=self._join())
        has_said_leaving = False
        while wake is self._wake:
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    await wake.wait()
                wake.clear()
            except TimeoutError:
                # A message without a field is a sign of life.
                yield worker_pb2.ConnectRequest()
            if self._leaving is not None and self._is_member and not has_said_leaving:
                has_said_leaving = True
                yield worker_pb2.ConnectRequest(draining=self._leaving)

    def _join(self) -> worker_pb2.Join:
        return worker_pb2.Join(
            node_id=self._config.node_id,
            hostname=socket.gethostname(),
            node_ip=host.address_towards(self._config.target),
            capacity=host.capacity(self._config),
            labels=self._config.labels,
            version=VERSION,
            protocol_version=PROTOCOL_VERSION,
        )
