"""The worker's stream: connects, greets the server, and reconnects after a break.

Rule: only `Close` tells why a stream ended; a stream that ends without it, or falls silent, is opened again.
"""

import asyncio
import logging
import math
import os
import random
import socket
import time
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from lattice.v1 import artifact_pb2_grpc, resources_pb2, worker_pb2, worker_pb2_grpc

from lattice_worker import background, convert
from lattice_worker.attempts import adoption
from lattice_worker.attempts.attempt_executor import AttemptExecutor
from lattice_worker.attempts.attempt_reports import AttemptReports
from lattice_worker.attempts.output_reports import OutputReports
from lattice_worker.attempts.questions import Questions
from lattice_worker.attempts.streams import Streams
from lattice_worker.channel import MESSAGE_LIMIT_BYTES, check_cancelled, opened
from lattice_worker.config import WorkerConfig
from lattice_worker.egress.agent import Egress
from lattice_worker.machine import host
from lattice_worker.machine.huge_pages import use_huge_pages
from lattice_worker.pool.runner_pool import Pool
from lattice_worker.pool.zygotes import Zygotes
from lattice_worker.sandbox.policy import LEVELS
from lattice_worker.session.artifact_upload import Uploads
from lattice_worker.session.lease_machine import LeaseMachine
from lattice_worker.session.limits import Limits
from lattice_worker.session.outbox import Leases, Outbox
from lattice_worker.store.artifact_staging import ArtifactStaging
from lattice_worker.store.local_store import LocalStore
from lattice_worker.store.peer_fetch import PeerFetcher

log = logging.getLogger(__name__)

VERSION = "0.1.0"
PROTOCOL_VERSION = 1
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.1, 2.0
FIRST_BEAT_S = 0.5  # Until the server says how often.
DIAL_S = 10.0  # How long a server may take for its first message.


class Agent:
    """One worker. Everything runs on one event loop."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._capacity = host.capacity(config)
        self._staging = ArtifactStaging(config.store_directory)
        self._pool = Pool(
            max(1, int(self._capacity.cpu)),
            self._staging,
            Zygotes(config.server, config.gateway_port, config.preload),
            config.engine,
            Egress(config.egress_networks),
            config.named_group,
        )
        store = config.store_directory
        incoming = self._staging.incoming
        self._fetcher = None if config.host_fd is None else PeerFetcher(config.host_fd, store, incoming)
        self._local_store = LocalStore(store, config.store_name, self._staging, lambda: self._artifacts, self._fetcher)
        self._limits = Limits()
        output = OutputReports(self._emit)
        self._questions = Questions(output.report, self._limits, self._local_store)
        self._streams = Streams(output.report, self._limits)
        reports = AttemptReports(self._local_store, self._limits, output, self._ended)
        self._executor = AttemptExecutor(
            self._pool, self._local_store, reports, self._questions, self._streams, self._limits, self._ask
        )
        self._leases: Leases = LeaseMachine(self._executor, self._say, convert.returned)
        self._outbox = Outbox(
            self._leases,
            self._limits,
            lambda: self._questions.last_answer,
            lambda: self._pool.counts.take(self._pool.all()),
        )
        self._heartbeat_s = FIRST_BEAT_S
        self._silence_limit_s = DIAL_S
        self._heard_at = 0.0
        self._is_welcome = False
        self._levels: frozenset[str] = frozenset()  # The isolation levels that can be set up here.
        self._network_levels: frozenset[str] = frozenset()  # The levels that restrict servers.
        self._listed: frozenset[str] = frozenset()
        self._artifacts: artifact_pb2_grpc.ArtifactServiceAsyncStub | None = None
        self._uploads = Uploads(self._local_store)
        self.refusal = ""

    async def run(self) -> None:
        """Serve until the server closes the session for good; `refusal` is the reason if it refused the worker."""
        await asyncio.to_thread(self._local_store.bundles.sweep)
        with self._local_store.opened(), self._staging.opened():
            await self._serve()

    async def _serve(self) -> None:
        if self._fetcher is not None:
            await self._fetcher.start()
        # Without spare processes an attempt starts its own.
        warming = background.start(self._pool.warm(), background.only_log)
        self._levels = frozenset(await self._pool.levels())
        self._network_levels = frozenset(await self._pool.network_levels(self._levels))
        use_huge_pages()
        backoff_s = MIN_BACKOFF_S
        try:
            while not await self._serve_stream():
                check_cancelled()
                if self._is_welcome:
                    backoff_s = MIN_BACKOFF_S
                # Random, so that not all workers reconnect at once to a server that was restarted.
                await asyncio.sleep(random.uniform(0, backoff_s))
                backoff_s = min(MAX_BACKOFF_S, backoff_s * 2)
        finally:
            warming.cancel()
            self._pool.close()
            await self._pool.wait_closed()
            self._local_store.bundles.close()
            if self._fetcher is not None:
                self._fetcher.close()

    def leave(self, deadline_s: float) -> None:
        """Ask the server to drain this worker: leases that still run after `deadline_s` are moved."""
        deadline = Duration(nanos=int(deadline_s % 1 * 1e9), seconds=int(deadline_s))
        self._outbox.drain(worker_pb2.Draining(deadline=deadline))

    async def _serve_stream(self) -> bool:
        """Serve one stream; return whether the worker is to end."""
        self._is_welcome = False
        self._silence_limit_s, self._heard_at = DIAL_S, asyncio.get_running_loop().time()
        async with opened(self._config) as channel:
            self._artifacts = artifact_pb2_grpc.ArtifactServiceStub(channel)
            workers = worker_pb2_grpc.WorkerServiceStub(channel)
            call = workers.Connect(self._outbox.open(self._hello()))
            beating = background.start(self._beat(call), lambda _: call.cancel())
            try:
                async for response in call:
                    self._heard_at = asyncio.get_running_loop().time()
                    if response.HasField("welcome"):
                        self._welcome(response.welcome)
                    if self._is_welcome:
                        self._take(response)
                        for wanted in response.send_artifacts:
                            self._uploads.start(workers, wanted)
                    if response.HasField("close"):
                        return self._closed(response.close)
            except grpc.aio.AioRpcError as error:
                log.info("the stream broke: %s", error.details(), extra=self._named())
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise  # Otherwise `_beat` has cancelled the call.
            finally:
                beating.cancel()
                self._outbox.close()
                self._artifacts = None
        return False

    async def _beat(self, call: grpc.aio.StreamStreamCall[Any, Any]) -> None:
        """Send heartbeats, and cancel a stream on which nothing arrives."""
        loop = asyncio.get_running_loop()
        while loop.time() - self._heard_at <= self._silence_limit_s:
            # Nothing wakes this earlier: heartbeats are for a stream on which nothing else is sent.
            await asyncio.sleep(self._heartbeat_s)
            self._outbox.beat()
        log.info("the server sent nothing for %.1f s", self._silence_limit_s, extra=self._named())
        call.cancel()

    def _closed(self, close: worker_pb2.Close) -> bool:
        reason = convert.close_reason(close)
        log.info("the server closed the stream: %s: %s", reason, close.message, extra=self._named())
        if close.reason == worker_pb2.CLOSE_REASON_SHUTDOWN:
            return self._config.exit_on_close
        if close.reason != worker_pb2.CLOSE_REASON_DRAINED:
            self.refusal = f"{reason}: {close.message}"
        return True

    def _named(self) -> dict[str, str]:
        """Return the ids that a log line about the stream names."""
        session_id = self._leases.session_id
        return {"worker_id": self._config.worker_id, "node_id": self._config.node_id, "session_id": session_id}

    def _hello(self) -> worker_pb2.Hello:
        self._listed = frozenset(self._staging.reported)
        refusals = self._pool.level_refusals()
        return worker_pb2.Hello(
            worker_id=self._config.worker_id,
            session_id=self._leases.session_id,
            node_id=self._config.node_id,
            hostname=socket.gethostname(),
            node_ip=host.address_towards(self._config.target),
            capacity=self._capacity,
            labels=self._config.labels,
            isolations=[number for number, level in convert.ISOLATIONS.items() if not level or level in self._levels],
            isolation_refusals=[
                resources_pb2.IsolationRefusal(isolation=number, reason=refusals[level])
                for number, level in convert.ISOLATIONS.items()
                if level in refusals
            ],
            network_isolations=[
                number for number, level in convert.ISOLATIONS.items() if level in self._network_levels
            ],
            memory_enforcement=self._memory_enforcement(),
            runtime=host.runtime(),
            version=VERSION,
            protocol_version=PROTOCOL_VERSION,
            send_time=convert.timestamp(time.time_ns()),
            held_lease_ids=self._leases.held(),
            held_leases=adoption.held_leases(self._leases, self._questions),
            pid=os.getpid(),
            stored_artifact_ids=self._local_store.stored(),
            reported_artifact_ids=self._listed,
        )

    def _memory_enforcement(self) -> resources_pb2.MemoryEnforcement.ValueType:
        if self._levels.isdisjoint(LEVELS):
            return resources_pb2.MEMORY_ENFORCEMENT_UNSPECIFIED
        has_groups = self._pool.has_groups
        return resources_pb2.MEMORY_ENFORCEMENT_CGROUP if has_groups else resources_pb2.MEMORY_ENFORCEMENT_MEASURED

    def _take(self, response: worker_pb2.ConnectResponse) -> None:
        """Handle a message, in the order of its fields."""
        if response.acknowledged_sequence:
            acknowledged = self._leases.reports.acknowledge(response.acknowledged_sequence)
            self._streams.acknowledge(acknowledged)
            if self._staging.reported:
                for report in acknowledged:
                    self._staging.settle(convert.artifacts_in(report))
        if response.drop_artifact_ids:
            self._local_store.drop(response.drop_artifact_ids)
        if response.functions or response.bundles:
            self._executor.learn(list(response.functions), list(response.bundles))
        for assignment in response.assignments:
            named = (assignment.lease_id, assignment.slot, assignment.after_lease_id, assignment.sequence)
            self._leases.assign(*named, assignment)
        for lease_id in response.revoke_lease_ids:
            self._leases.revoke(lease_id)
        for lease_id in response.stop_lease_ids:
            self._leases.stop(lease_id)
        if response.forget_digests:
            self._executor.code.forget(response.forget_digests)
        for answer in response.answers:
            self._questions.answer(answer)

    def _welcome(self, welcome: worker_pb2.Welcome) -> None:
        self._heartbeat_s = convert.seconds(welcome.heartbeat_interval) or self._heartbeat_s
        self._silence_limit_s = convert.seconds(welcome.silence_limit) or math.inf
        self._limits.inline_bytes = welcome.inline_limit_bytes
        self._limits.log_bytes = welcome.log_limit_bytes
        self._limits.message_bytes = min(welcome.message_limit_bytes or MESSAGE_LIMIT_BYTES, MESSAGE_LIMIT_BYTES)
        self._limits.question_bytes = welcome.question_limit_bytes
        self._limits.chunk_bytes = welcome.chunk_limit_bytes
        self._limits.takes_calls = welcome.takes_calls
        self._limits.takes_signals = welcome.takes_signals
        if welcome.resumed or welcome.session_id == self._leases.session_id:
            self._leases.welcome(welcome.session_id, welcome.resumed, welcome.drop_lease_ids)
        else:
            self._begin(welcome.session_id, frozenset(welcome.adopted_lease_ids))
        self._local_store.drop(welcome.drop_artifact_ids)
        self._executor.code.renew()
        self._is_welcome = True
        self._outbox.resume(self._leases.reports.unacknowledged())
        if unknown := self._executor.missing_code():
            self._outbox.ask(unknown)

    def _begin(self, session_id: str, adopted: frozenset[str]) -> None:
        """Begin a new session, with the leases of the old one that the server has adopted."""
        adoption.begin(session_id, adopted, self._leases, self._questions, self._local_store)
        if not adopted:
            # Artifacts that were made since the hello: their reports were for the old session, and are dropped.
            self._local_store.drop(self._staging.reported - self._listed)
            self._staging.settle(self._listed)

    def _emit(self, report: worker_pb2.Report) -> None:
        if self._leases.holds(report.lease_id):
            self._leases.report(report.lease_id, report)
        else:
            self._local_store.drop(convert.artifacts_in(report))

    def _say(self, sequence: int, report: worker_pb2.Report) -> None:
        report.sequence = sequence
        self._outbox.report(report)

    def _ask(self, digest: str) -> None:
        self._outbox.ask([digest])

    def _ended(self, lease_id: str, outputs: convert.Outputs | None) -> None:
        self._leases.ended(lease_id, outputs)
