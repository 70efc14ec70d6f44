"""Owns the worker's stream: dials, says hello, holds the session, comes back after a break.

Rule: `Close` is the truth about why a stream ended; a stream that ends without it is dialled again.
"""

import asyncio
import contextlib
import logging
import os
import random
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
from lattice.v1 import resources_pb2, worker_pb2, worker_pb2_grpc

from lattice_worker import host
from lattice_worker.attempts import Attempts
from lattice_worker.config import WorkerConfig
from lattice_worker.convert import Outputs
from lattice_worker.pool import Pool
from lattice_worker.session import Session

log = logging.getLogger(__name__)

VERSION = "0.1.0"
MESSAGE_LIMIT_BYTES = 256 * 1024 * 1024
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.1, 5.0
COALESCE_S = 0.001
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]


class Agent:
    """One worker. Everything runs on one event loop."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._capacity = host.capacity(config)
        self._pool = Pool(spare=max(1, int(self._capacity.cpu)) * 2)
        self._session: Session[worker_pb2.Assignment, worker_pb2.Report] = Session()
        self._attempts = Attempts(self._pool, config.store_directory, config.node_id, self._emit, self._ended)
        self._pending: list[worker_pb2.Report] = []
        self._wake = asyncio.Event()
        self._heartbeat_s = 5.0
        self._is_welcome = False

    async def run(self) -> None:
        """Serve until the server closes the session for good."""
        (Path(self._config.store_directory) / "spares").mkdir(parents=True, exist_ok=True)
        warming = asyncio.create_task(self._pool.warm(max(1, int(self._capacity.cpu))))
        backoff_s = MIN_BACKOFF_S
        try:
            while not await self._serve_stream():
                if self._is_welcome:
                    backoff_s = MIN_BACKOFF_S
                # Spread, so that a server that comes back does not meet all its workers at once.
                await asyncio.sleep(random.uniform(0, backoff_s))
                backoff_s = min(MAX_BACKOFF_S, backoff_s * 2)
        finally:
            warming.cancel()
            self._pool.close()

    async def _serve_stream(self) -> bool:
        """Hold one stream; return whether the worker is to end."""
        self._is_welcome = False
        # A broken stream's generator may live on; what wakes this stream must not wake that one.
        self._wake = asyncio.Event()
        async with grpc.aio.insecure_channel(self._config.target, options=CHANNEL_OPTIONS) as channel:
            call = worker_pb2_grpc.WorkerServiceStub(channel).Connect(self._requests(), metadata=self._credentials())
            try:
                async for response in call:
                    if response.WhichOneof("message") == "close":
                        return self._closed(response.close)
                    self._take(response)
            except grpc.aio.AioRpcError as error:
                log.info("the stream broke: %s", error.details())
        return False

    def _closed(self, close: worker_pb2.Close) -> bool:
        reason = worker_pb2.CloseReason.Name(close.reason)
        log.info("the server closed the stream: %s: %s", reason, close.message)
        if close.reason != worker_pb2.CLOSE_REASON_SHUTDOWN:
            return True
        return self._config.exit_on_close

    async def _requests(self) -> AsyncIterator[worker_pb2.ConnectRequest]:
        yield worker_pb2.ConnectRequest(hello=self._hello())
        loop = asyncio.get_running_loop()
        sent_at = 0.0
        wake = self._wake
        while wake is self._wake:
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    await wake.wait()
            except TimeoutError:
                heartbeat = worker_pb2.Heartbeat(held_lease_ids=self._session.held())
                yield worker_pb2.ConnectRequest(heartbeat=heartbeat)
            wake.clear()
            if self._is_welcome and self._pending:
                if (wait_s := sent_at + COALESCE_S - loop.time()) > 0:
                    # A message costs both sides more than the reports in it: what comes in quick succession shares one.
                    await asyncio.sleep(wait_s)
                pending, self._pending = self._pending, []
                sent_at = loop.time()
                yield worker_pb2.ConnectRequest(reports=worker_pb2.Reports(reports=pending))

    def _credentials(self) -> tuple[tuple[str, str], ...]:
        token = self._config.token
        return (("authorization", f"Bearer {token}"),) if token else ()

    def _hello(self) -> worker_pb2.Hello:
        return worker_pb2.Hello(
            worker_id=self._config.worker_id,
            session_id=self._session.session_id,
            node_id=self._config.node_id,
            hostname=socket.gethostname(),
            node_ip="127.0.0.1",
            capacity=self._capacity,
            labels=self._config.labels,
            isolations=[resources_pb2.ISOLATION_NONE],
            runtime=host.runtime(),
            version=VERSION,
            held_lease_ids=self._session.held(),
            pid=os.getpid(),
        )

    def _take(self, response: worker_pb2.ConnectResponse) -> None:
        match response.WhichOneof("message"):
            case "assignments":
                work = response.assignments
                self._attempts.learn(list(work.functions), list(work.bundles))
                for assignment in work.assignments:
                    self._assign(assignment)
            case "ack":
                self._session.acknowledge(response.ack.sequence)
            case "revoke":
                for lease_id in response.revoke.lease_ids:
                    self._revoke(lease_id)
            case "stop":
                for lease_id in response.stop.lease_ids:
                    self._stop(lease_id)
            case "drop_artifacts":
                for artifact_id in response.drop_artifacts.artifact_ids:
                    with contextlib.suppress(FileNotFoundError):
                        (Path(self._config.store_directory) / os.path.basename(artifact_id)).unlink()
            case "welcome":
                self._welcome(response.welcome)
            case _:
                pass

    def _assign(self, assignment: worker_pb2.Assignment) -> None:
        lease_id, after = assignment.lease_id, assignment.after_lease_id
        if self._session.has_started(lease_id) is not None:
            return
        if after and not self._session.follow(lease_id, after):
            self._report(worker_pb2.Report(lease_id=lease_id, returned=worker_pb2.LeaseReturned()))
            return
        started = self._session.assign(lease_id, assignment.slot, assignment)
        if started is not None:
            self._attempts.start(started)
        elif not after:
            self._send_ahead(self._session.running_before(lease_id))

    def _welcome(self, welcome: worker_pb2.Welcome) -> None:
        self._heartbeat_s = welcome.heartbeat_interval.ToTimedelta().total_seconds() or self._heartbeat_s
        self._attempts.inline_limit_bytes = welcome.inline_limit_bytes
        self._attempts.log_limit_bytes = welcome.log_limit_bytes
        dropped = list(welcome.drop_lease_ids) if welcome.resumed else self._session.held()
        for lease_id in dropped:
            self._drop(lease_id)
        if not welcome.resumed:
            self._session.reset(welcome.session_id)
        self._pending = self._session.unacknowledged()
        self._is_welcome = True
        self._wake.set()

    def _drop(self, lease_id: str) -> None:
        if self._session.has_started(lease_id):
            self._attempts.stop(lease_id, "cancelled", "the server forgot the lease")
        elif self._session.has_started(lease_id) is False:
            if not self._attempts.take_back(lease_id):
                self._attempts.stop(lease_id, "cancelled", "the server forgot the lease")
            self._session.end(lease_id)

    def _send_ahead(self, running: str) -> None:
        """Send what waits behind a running lease to its process, as far as it needs nothing of what is before it."""
        for lease_id in self._session.behind(running):
            if not self._attempts.send_ahead(self._session.work_of(lease_id), running):
                return

    def _revoke(self, lease_id: str) -> None:
        if self._session.has_started(lease_id) is False and self._attempts.take_back(lease_id):
            self._report(worker_pb2.Report(lease_id=lease_id, returned=worker_pb2.LeaseReturned()))
            self._ended(lease_id, None)

    def _stop(self, lease_id: str) -> None:
        has_started = self._session.has_started(lease_id)
        if has_started:
            self._attempts.stop(lease_id, "cancelled", "the attempt was cancelled")
        elif has_started is False and self._attempts.take_back(lease_id):
            self._attempts.cancelled(self._session.work_of(lease_id))
        elif has_started is False:
            self._attempts.stop(lease_id, "cancelled", "the attempt was cancelled")

    def _emit(self, report: worker_pb2.Report) -> None:
        if self._session.has_started(report.lease_id) is not None:
            self._report(report)

    def _report(self, report: worker_pb2.Report) -> None:
        report.sequence = self._session.add_report(report.lease_id, report)
        self._pending.append(report)
        self._wake.set()

    def _ended(self, lease_id: str, outputs: Outputs | None) -> None:
        if self._session.has_started(lease_id) is None:
            return
        for follower in self._session.take_followers(lease_id):
            if outputs is None:
                self._revoke(follower)
            else:
                self._attempts.feed(follower, outputs)
        following = self._session.end(lease_id)
        if following is not None:
            self._attempts.start(following)
            if not self._attempts.has_ahead(following.lease_id):
                self._send_ahead(following.lease_id)
