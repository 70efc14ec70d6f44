"""Executes leases: prepares them, runs them on runners, and stops them.

Rule: a lease that was taken ends once, whatever happens to the process that ran it.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from lattice.v1 import resources_pb2, task_pb2, worker_pb2

from lattice_worker import background, convert
from lattice_worker.attempts import outcomes
from lattice_worker.attempts.attempt_reports import AttemptReports
from lattice_worker.attempts.code_cache import CodeCache
from lattice_worker.attempts.execution import Execution, named
from lattice_worker.attempts.preparation import Preparation
from lattice_worker.attempts.questions import Questions
from lattice_worker.attempts.streams import Streams
from lattice_worker.egress.agent import Connection
from lattice_worker.masking import Log, Masker
from lattice_worker.pool.crash import Suspects
from lattice_worker.pool.invocation import NOTICE_BYTES, Invocation, RunnerKey, failed
from lattice_worker.pool.pipelining import MAX_PIPELINED
from lattice_worker.pool.runner_handle import Runner
from lattice_worker.pool.runner_pool import Pool
from lattice_worker.sandbox.results import InputError
from lattice_worker.sandbox.supervisor import SandboxError
from lattice_worker.session.limits import Limits
from lattice_worker.store.local_store import LocalStore, MissingError

log = logging.getLogger(__name__)

CANCEL_GRACE_S = 1.0


class AttemptExecutor:
    """Runs leases on runners. `request_code` takes the digest of each function that a lease needs and that is not here.

    The agent hands code to `learn`, answers to `questions`, and acknowledgements to `streams`.
    """

    def __init__(
        self,
        pool: Pool,
        local_store: LocalStore,
        reports: AttemptReports,
        questions: Questions,
        streams: Streams,
        limits: Limits,
        request_code: Callable[[str], None],
    ) -> None:
        self.code = CodeCache(local_store.bundles, pool)
        self.questions = questions
        self.streams = streams
        self._preparation = Preparation(self.code.bundles, local_store, limits)
        self._pool, self._reports, self._request_code = pool, reports, request_code
        self._executions: dict[str, Execution] = {}
        self._suspects = Suspects()

    @property
    def is_idle(self) -> bool:
        """Whether no lease is known."""
        return not self._executions

    def learn(self, functions: list[task_pb2.Function], bundles: list[task_pb2.CodeBundle]) -> None:
        """Take code, and start the leases that wait for it."""
        self.code.learn(functions, bundles)
        for assignment in self._waiting_for_code():
            if self.code.get(assignment.function_digest) is not None:
                self.start(assignment)

    def missing_code(self) -> set[str]:
        """Return the digests of the functions that leases wait for."""
        return {assignment.function_digest for assignment in self._waiting_for_code()}

    def _waiting_for_code(self) -> list[worker_pb2.Assignment]:
        started = (e for e in self._executions.values() if e.preparing is None and e.sent is None)
        return [execution.assignment for execution in started if execution.assignment is not None]

    # Commands about leases that have not started.

    def feed(self, lease_id: str, outputs: convert.Outputs) -> None:
        """Take the outputs of the lease that a lease follows: some are its inputs."""
        self._execution(lease_id).upstream = outputs

    def send_ahead(self, assignment: worker_pb2.Assignment, running: str) -> bool:
        """Pipeline a lease behind one that runs; False when it has to wait until it is started."""
        execution, ahead = self._execution(assignment.lease_id), self._executions.get(running)
        if execution.pipelined_on is not None:
            return True
        runner = None if ahead is None else ahead.running_on
        function = self.code.get(assignment.function_digest)
        if runner is None or function is None or (assignment.after_lease_id and execution.upstream is None):
            return False
        if not runner.is_fit or runner.key.is_async or len(runner.pipeline) >= MAX_PIPELINED:
            return False
        if assignment.isolation != resources_pb2.ISOLATION_NONE:
            return False
        if self._preparation.key(assignment, function, self._suspects) != runner.key:
            return False
        if self._preparation.missing(assignment, function, execution.upstream):
            return False
        invocation = self._invocation(assignment, function, execution, runner)
        execution.sent = runner, invocation
        runner.send_ahead(invocation)
        return True

    def has_ahead(self, lease_id: str) -> bool:
        """Whether leases are pipelined behind one that runs."""
        execution = self._executions.get(lease_id)
        runner = None if execution is None else execution.running_on
        return runner is not None and len(runner.pipeline) > 0

    def take_back(self, lease_id: str) -> bool:
        """Forget a lease, and make sure that no runner begins it; False when one has begun it and is not stopped."""
        execution = self._executions.get(lease_id)
        if execution is not None and (runner := execution.pipelined_on) is not None:
            is_stopped = execution.sent is not None and execution.sent[1].ending is not None
            if not runner.take_back(lease_id) and not is_stopped:
                return False
        self._forget(lease_id)
        return True

    # Commands that start and end leases.

    def start(self, assignment: worker_pb2.Assignment) -> None:
        """Start a lease that is next in its slot."""
        try:
            self._start(assignment, self._execution(assignment.lease_id))
        except Exception as error:  # A lease that was taken has to end, also if this is a bug.
            log.exception("the lease could not be started", extra=named(assignment))
            self._fail_to_start(assignment, error)

    def stop(self, lease_id: str, kind: str, message: str) -> None:
        """End a lease as a failure of this kind."""
        execution = self._executions.get(lease_id)
        if execution is None:
            return
        answer = failed(kind, message)
        if execution.sent is None:
            if execution.preparing is not None:
                execution.preparing.cancel()
            if execution.assignment is not None:
                self._end(execution.assignment, answer, [])
            return
        runner, invocation = execution.sent
        if invocation.ending is not None or (not execution.has_begun and execution.pipelined_on is None):
            return
        invocation.ending = answer
        if runner.key.is_async:
            runner.cancel(lease_id)
            # A coroutine that does not end is abandoned by its process, unless it blocks the event loop.
            execution.cancel_timer()
            execution.timer = asyncio.get_running_loop().call_later(CANCEL_GRACE_S, runner.kill_blocked)
        else:
            runner.kill()

    def cancelled(self, assignment: worker_pb2.Assignment) -> None:
        """End a lease that was cancelled before it started."""
        self._fail(assignment, "cancelled", "cancelled before it started")

    def _start(self, assignment: worker_pb2.Assignment, execution: Execution) -> None:
        if assignment.isolation not in convert.ISOLATIONS:
            level = resources_pb2.Isolation.Name(assignment.isolation)
            self._fail(assignment, "sandbox_setup", f"this worker cannot set up {level}")
            return
        execution.assignment = assignment
        if execution.sent is not None:
            runner, invocation = execution.sent
            if execution.pipelined_on is not None:
                self._begin(assignment, execution, runner, runner.begin(assignment.lease_id))
                return
            execution.sent = None
            if invocation.ending is not None:  # It was stopped, and its process is gone.
                self._end(assignment, invocation.ending, [])
                return
        function = self.code.get(assignment.function_digest)
        if function is None:
            self._request_code(assignment.function_digest)
            return
        key = self._preparation.key(assignment, function, self._suspects)
        missing = self._preparation.missing(assignment, function, execution.upstream)
        runner_or_none = None if missing else self._pool.take_idle(key)
        if runner_or_none is not None:
            self._run(assignment, function, execution, runner_or_none)
            return
        preparing = self._start_cold(assignment, function, execution, key, missing)
        execution.preparing = background.start(preparing, partial(self._fail_to_start, assignment))
        self.code.bundles.need(key.bundle)
        execution.preparing.add_done_callback(lambda _: self.code.bundles.release(key.bundle))
        execution.preparing.add_done_callback(lambda _: self.code.drop_bundles())

    async def _start_cold(
        self,
        assignment: worker_pb2.Assignment,
        function: task_pb2.Function,
        execution: Execution,
        key: RunnerKey,
        missing: list[asyncio.Task[Any]],
    ) -> None:
        """Run a lease once its artifacts and its bundle are here and a runner has started."""
        try:
            for wait in missing:
                # Other leases may wait for the same.
                await asyncio.shield(wait)
            self._run(assignment, function, execution, await self._pool.take(key))
        except OSError as error:
            self._fail(assignment, "resources", f"a process could not be started: {error}")
        except SandboxError as error:
            self._fail(assignment, "sandbox_setup", str(error))
        except MissingError as error:
            self._fail(assignment, "payload", str(error))
        except Exception as error:
            # For example a bundle that is no archive. A lease that was taken has to end.
            text = f"what it needs could not be made ready: {type(error).__name__}: {error}"
            self._fail(assignment, "payload", text)

    def _run(
        self, assignment: worker_pb2.Assignment, function: task_pb2.Function, execution: Execution, runner: Runner
    ) -> None:
        try:
            invocation = self._invocation(assignment, function, execution, runner)
        except InputError as error:
            runner.kill()
            self._fail(assignment, "payload", str(error))
            return
        self._begin(assignment, execution, runner, invocation)
        runner.invoke(invocation)

    def _begin(
        self, assignment: worker_pb2.Assignment, execution: Execution, runner: Runner, invocation: Invocation
    ) -> None:
        lease_id = assignment.lease_id
        _note("the attempt starts", assignment)
        execution.preparing, execution.sent, execution.has_begun = None, (runner, invocation), True
        self._reports.start(lease_id)
        seconds = convert.seconds(assignment.timeout)
        if not seconds and runner.sandbox is not None:
            seconds = runner.sandbox.policy.time_s
        if seconds or assignment.HasField("timeout"):
            # The time a process takes to start up is not the attempt's.
            runner.when_ready(lambda: self._start_clock(lease_id, seconds))

    def _start_clock(self, lease_id: str, seconds: float) -> None:
        execution = self._executions.get(lease_id)
        if execution is not None and execution.has_begun and execution.timer is None:
            text = f"the attempt ran longer than {seconds:g} s"
            loop = asyncio.get_running_loop()
            execution.timer = loop.call_later(seconds, self.stop, lease_id, "timeout", text)

    def _execution(self, lease_id: str) -> Execution:
        execution = self._executions.get(lease_id)
        if execution is None:
            execution = self._executions[lease_id] = Execution()
        return execution

    def _invocation(
        self, assignment: worker_pb2.Assignment, function: task_pb2.Function, execution: Execution, runner: Runner
    ) -> Invocation:
        lease_id = assignment.lease_id
        log: Log = partial(self._reports.log, lease_id)
        masker = execution.masker = Masker.of(assignment)
        header, blobs = self._preparation.frame(assignment, function, execution.upstream, runner)
        return Invocation(
            lease_id,
            header,
            blobs,
            on_log=log if masker is None else partial(masker.log, log),
            on_spawn=lambda task, parts: self._spawn(assignment, function, task, parts),
            on_ask=lambda asked, parts: self.questions.ask(assignment, runner, asked, parts),
            on_spans=lambda frame: self._reports.trace(assignment, frame if masker is None else masker.value(frame)),
            on_stream=lambda told, parts: self._stream(assignment, runner, told, parts),
            on_access=lambda access: self._reports.access(lease_id, access),
            on_end=lambda answer, parts: self._end(assignment, answer, parts, runner.connection),
            on_refused=lambda: self._start_again(assignment),
            on_given_back=lambda reason, is_suspect: self._give_back(assignment, reason, is_suspect=is_suspect),
            screen=None if runner.sandbox is None else partial(self._preparation.screened, runner),
            raw_left=header["log_limit"],
            log_left=header["log_limit"] + NOTICE_BYTES,
        )

    # Events of an invocation.

    def _spawn(
        self, assignment: worker_pb2.Assignment, function: task_pb2.Function, task: dict[str, Any], blobs: list[bytes]
    ) -> None:
        if excess := self._reports.spawn(assignment, function, task, blobs):
            self.stop(assignment.lease_id, "payload", excess)

    def _stream(
        self, assignment: worker_pb2.Assignment, runner: Runner, told: dict[str, Any], blobs: list[bytes]
    ) -> None:
        if told["kind"] == "chunk":
            self.streams.take(assignment, runner, told, blobs)
        else:
            self.streams.take_progress(assignment, told)

    def _start_again(self, assignment: worker_pb2.Assignment) -> None:
        """Start a lease that its runner did not begin."""
        execution = self._execution(assignment.lease_id)
        execution.cancel_timer()
        execution.sent, execution.has_begun = None, False
        self.start(assignment)

    def _give_back(self, assignment: worker_pb2.Assignment, reason: str, *, is_suspect: bool) -> None:
        """Return a lease whose runner died; another lease may be the cause."""
        if is_suspect:
            self._suspects.add(assignment)
        if (masker := self._execution(assignment.lease_id).masker) is not None:
            masker.release(partial(self._reports.log, assignment.lease_id))
        self._forget(assignment.lease_id)
        self._reports.give_back(assignment.lease_id, reason)

    def _fail(self, assignment: worker_pb2.Assignment, kind: str, message: str) -> None:
        self._end(assignment, failed(kind, message), [])

    def _fail_to_start(self, assignment: worker_pb2.Assignment, error: BaseException) -> None:
        self._fail(assignment, "internal", f"the attempt could not be started: {type(error).__name__}: {error}")

    def _end(
        self,
        assignment: worker_pb2.Assignment,
        answer: dict[str, Any],
        blobs: list[bytes],
        connection: Connection | None = None,
    ) -> None:
        _note("the attempt ended", assignment)
        if (masker := self._execution(assignment.lease_id).masker) is not None:
            masker.release(partial(self._reports.log, assignment.lease_id))
            answer = masker.answer(answer, blobs)
        self._forget(assignment.lease_id)
        if outcomes.has_crashed(answer):
            self._suspects.add(assignment)
        self._reports.end(assignment, answer, blobs, connection)

    def _forget(self, lease_id: str) -> None:
        if (execution := self._executions.pop(lease_id, None)) is not None:
            execution.cancel_timer()
        self.questions.forget(lease_id)
        self.streams.end(lease_id)


def _note(what: str, assignment: worker_pb2.Assignment) -> None:
    if log.isEnabledFor(logging.DEBUG):
        log.debug(what, extra=named(assignment))
