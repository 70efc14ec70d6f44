"""The needs of a lease before it runs: a runner of the right key, artifacts and a bundle on this machine, a frame."""

import asyncio
import math
from typing import Any

from lattice.v1 import task_pb2, worker_pb2

from lattice_worker import convert
from lattice_worker.attempts.streams import WINDOW_BYTES, WINDOW_CHUNKS
from lattice_worker.attempts.tracing import trace_parent
from lattice_worker.pool.crash import Suspects
from lattice_worker.pool.invocation import Frame, RunnerKey
from lattice_worker.pool.runner_handle import Runner
from lattice_worker.sandbox.policy import DOCKER
from lattice_worker.sandbox.results import LARGEST_INLINE_BYTES, inlined, screened
from lattice_worker.session.limits import Limits
from lattice_worker.store.bundles import Bundles
from lattice_worker.store.local_store import LocalStore

WINDOW = (WINDOW_CHUNKS, WINDOW_BYTES)


class Preparation:
    """Finds out what assignments need. `upstream` are the outputs of the lease that an assignment follows, if any."""

    def __init__(self, bundles: Bundles, local_store: LocalStore, limits: Limits) -> None:
        self._bundles, self._local_store, self._limits = bundles, local_store, limits

    def key(self, assignment: worker_pb2.Assignment, function: task_pb2.Function, suspects: Suspects) -> RunnerKey:
        """Return the key of the runners that may run an assignment."""
        bundle, concurrency = self._bundles.path(function.bundle_digest), function.python.concurrency
        isolation = convert.ISOLATIONS.get(assignment.isolation, "")
        is_async = concurrency == task_pb2.CONCURRENCY_ASYNC and not isolation
        is_alone = concurrency == task_pb2.CONCURRENCY_FRESH_PROCESS or suspects.includes(assignment)
        variables = tuple(sorted(assignment.environment.items())) if assignment.environment else ()
        owner = assignment.lease_id if is_alone or isolation or variables else ""
        gpus, threads = tuple(assignment.gpu_indices), max(1, math.ceil(assignment.resources.cpu))
        memory_bytes = assignment.resources.memory_bytes if isolation == DOCKER else 0
        network = tuple(assignment.sandbox.network) if isolation else ()
        environment = (variables, bool(assignment.secret_variables))
        sandbox = (isolation, threads, memory_bytes, network)
        return RunnerKey(assignment.tenant, bundle, gpus, is_async, owner, *sandbox, *environment)

    def missing(
        self, assignment: worker_pb2.Assignment, function: task_pb2.Function, upstream: convert.Outputs | None
    ) -> list[asyncio.Task[Any]]:
        """Return the transfers and the unpacking that an assignment has to wait for; in most cases none."""
        return self._local_store.missing(function.bundle_digest, assignment, upstream or {})

    def frame(
        self,
        assignment: worker_pb2.Assignment,
        function: task_pb2.Function,
        upstream: convert.Outputs | None,
        runner: Runner,
    ) -> Frame:
        """Send a runner the function, unless it has it; return the frame that invokes it.

        Raises InputError when an input cannot be sent to a sandbox.
        """
        bundle = self._bundles.path(function.bundle_digest)
        runner.functions.define(function.digest, lambda: convert.function_frame(function, bundle))
        blobs: list[bytes] = []
        store, outputs = self._local_store.directory, upstream or {}
        header: dict[str, Any] = {
            "kind": "invoke",
            "id": assignment.lease_id,
            "digest": function.digest,
            "attempts": [[attempt.run_id, attempt.task_id, attempt.number] for attempt in assignment.attempts],
            "items": [
                # A map of the contract has no order; a function that takes any inputs gets them by name.
                {name: convert.binding_tree(a.inputs[name], store, blobs, outputs) for name in sorted(a.inputs)}
                for a in assignment.attempts
            ],
            "batched": assignment.batched,
            "outputs": list(assignment.outputs),
            "split": list(assignment.split_outputs),
            # Coroutines share a process, whose memory cannot be counted for each of them.
            "memory_limit": 0 if runner.key.is_async else assignment.resources.memory_bytes,
            "store": store,
            "folder": runner.folder,
            "inline_limit": self._limits.inline_bytes,
            "log_limit": self._limits.log_bytes,
            "question_limit": self._limits.question_bytes,
            "takes_calls": self._limits.takes_calls,
            "takes_signals": self._limits.takes_signals,
            "chunk_limit": self._limits.chunk_bytes,
            "chunk_window": WINDOW,
            "timeout": convert.seconds(assignment.timeout),
        }
        if parent := trace_parent(assignment):
            header["trace"] = parent
        if runner.sandbox is not None:
            header["items"] = [
                {name: inlined(found, blobs) for name, found in item.items()} for item in header["items"]
            ]
            header |= {"store": "", "folder": "", "inline_limit": LARGEST_INLINE_BYTES, "as_data": True}
            header["timeout"] = header["timeout"] or runner.sandbox.policy.time_s
        return header, blobs

    def screened(self, runner: Runner, answer: dict[str, Any], blobs: list[bytes]) -> Frame:
        """Return the part of an answer of a sandboxed runner that is accepted. Raises ProtocolError."""
        return screened(answer, blobs, self._local_store.directory, runner.folder, self._limits.inline_bytes)
