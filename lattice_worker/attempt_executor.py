"""Owns the execution of leases: from an assignment to the reports of how it went.

Rule: a lease that was taken ends in exactly one report, whatever happens to the process that ran it.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from lattice.v1 import resources_pb2, task_pb2, worker_pb2

from lattice_worker import convert
from lattice_worker.channel import MESSAGE_LIMIT_BYTES
from lattice_worker.local_store import Materials, MissingError
from lattice_worker.questions import Questions
from lattice_worker.runner_pool import Pool
from lattice_worker.runner_process import MAX_AHEAD, Invocation, Key, Runner
from lattice_worker.sandbox.policy import SECCOMP, SUBPROCESS
from lattice_worker.sandbox.results import LARGEST_INLINE_BYTES, InputError, inlined, screened
from lattice_worker.sandbox.supervisor import SandboxError

log = logging.getLogger(__name__)

# A start is told late, so that a short attempt needs one report instead of two.
START_DELAY_S = 0.002
CANCEL_GRACE_S = 1.0
LOG_CHARACTERS = 256 * 1024  # The most of an attempt's output that one report holds.

# Answers of so many values, or so many bytes, are converted away from the event loop.
LARGE_ANSWER_BLOBS = 500
LARGE_ANSWER_BYTES = 1024 * 1024
MAX_SUSPECTS = 1000

# The levels of sandboxes, by their numbers in the contract.
ISOLATIONS = {
    resources_pb2.ISOLATION_NONE: "",
    resources_pb2.ISOLATION_SUBPROCESS: SUBPROCESS,
    resources_pb2.ISOLATION_SECCOMP: SECCOMP,
}

Emit = Callable[[worker_pb2.Report], None]
Ended = Callable[[str, convert.Outputs | None], None]
Ask = Callable[[str], None]


class Attempts:
    """Runs leases on runners. `emit` takes reports, `ended` is told each lease that is over, with what it gave.

    `ask` is told the digest of each function that a lease names and that is not here.
    """

    def __init__(self, pool: Pool, materials: Materials, emit: Emit, ended: Ended, ask: Ask) -> None:
        self.inline_limit_bytes = 256 * 1024
        self.log_limit_bytes = 1024 * 1024
        self.message_limit_bytes = MESSAGE_LIMIT_BYTES
        self._pool, self._materials = pool, materials
        self._emit, self._ended, self._ask = emit, ended, ask
        self.questions = Questions(emit)
        self._functions: dict[str, task_pb2.Function] = {}
        self._stale: set[str] = set()
        self._codeless: dict[str, worker_pb2.Assignment] = {}
        self._upstream: dict[str, convert.Outputs] = {}
        self._running: dict[str, tuple[Runner, Invocation]] = {}
        self._ahead: dict[str, Runner] = {}
        self._unstarted: dict[str, int] = {}  # When they began, in nanoseconds since the epoch.
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._starting: dict[str, tuple[asyncio.Task[None], worker_pb2.Assignment]] = {}
        self._converting: set[asyncio.Task[None]] = set()
        self._suspects: dict[tuple[str, str], None] = {}
        self._start_timer: asyncio.TimerHandle | None = None
        self._bundles = materials.bundles
        pool.retired, pool.on_gone = self._bundles.retired, self._drop_bundles

    def learn(self, functions: list[task_pb2.Function], bundles: list[task_pb2.CodeBundle]) -> None:
        """Keep code for later assignments."""
        self._stale.difference_update(function.digest for function in functions)
        self._stale.difference_update(bundle.digest for bundle in bundles)
        for function in functions:
            self._functions[function.digest] = function
        self._bundles.learn(bundles)
        for lease_id, assignment in list(self._codeless.items()):
            if assignment.function_digest in self._functions:
                del self._codeless[lease_id]
                self.start(assignment)

    def forget(self, digests: Iterable[str]) -> None:
        """Drop functions, here and in the processes, and bundles with the processes that have them."""
        for digest in digests:
            self._functions.pop(digest, None)
        self._bundles.retire(digests)
        self._pool.forget(digests)
        self._drop_bundles()

    def _drop_bundles(self) -> None:
        self._bundles.drop_unused(self._pool.uses)

    def renew(self) -> None:
        """Note that a new stream begins: the server sends again what it uses, and names nothing else to be dropped.

        What it has not used on the last stream is dropped. To drop all would end processes that are used again soon.
        """
        self.forget(self._stale)
        self._stale = self._functions.keys() | self._bundles.known

    def unknown(self) -> set[str]:
        """Return the digests of the functions that leases wait for."""
        return {assignment.function_digest for assignment in self._codeless.values()}

    def feed(self, lease_id: str, outputs: convert.Outputs) -> None:
        """Keep what a lease will need when its turn comes."""
        self._upstream[lease_id] = outputs

    def start(self, assignment: worker_pb2.Assignment) -> None:
        """Start a lease whose turn has come."""
        try:
            self._start(assignment)
        except Exception as error:  # A lease that was taken has to end, also if this is a bug.
            log.exception("the lease could not be started", extra=_named(assignment))
            text = f"the attempt could not be started: {type(error).__name__}: {error}"
            self._fail(assignment, {"kind": "internal", "message": text})

    def _start(self, assignment: worker_pb2.Assignment) -> None:
        lease_id = assignment.lease_id
        if assignment.isolation not in ISOLATIONS:
            level = resources_pb2.Isolation.Name(assignment.isolation)
            self._fail(assignment, {"kind": "sandbox_setup", "message": f"this worker cannot set up {level}"})
            return
        if (sent := self._ahead.pop(lease_id, None)) is not None and lease_id in sent.ahead:
            self._begin(assignment, sent, sent.begin(lease_id))
            return
        if assignment.function_digest not in self._functions:
            self._codeless[lease_id] = assignment
            self._ask(assignment.function_digest)
            return
        function, bundle, key = self._needs(assignment)
        missing = self._missing(assignment, function)
        runner = None if missing else self._pool.take_idle(key)
        if runner is not None:
            self._run(assignment, function, bundle, runner)
        else:
            cold = asyncio.get_running_loop().create_task(self._start_cold(assignment, function, bundle, key, missing))
            self._starting[lease_id] = (cold, assignment)
            self._bundles.need(bundle)
            cold.add_done_callback(lambda _: self._bundles.release(bundle))
            cold.add_done_callback(lambda _: self._drop_bundles())

    def send_ahead(self, assignment: worker_pb2.Assignment, running: str) -> bool:
        """Send a lease whose turn will come to the process of the one that is running; False when it has to wait."""
        lease_id = assignment.lease_id
        if (sent := self._ahead.get(lease_id)) is not None and lease_id in sent.ahead:
            return True
        found = self._running.get(running)
        if found is None or (assignment.after_lease_id and lease_id not in self._upstream):
            return False
        runner = found[0]
        if assignment.function_digest not in self._functions:
            return False
        function, bundle, key = self._needs(assignment)
        if key != runner.key or key.is_async or not runner.is_fit or len(runner.ahead) >= MAX_AHEAD:
            return False
        if assignment.isolation != resources_pb2.ISOLATION_NONE or self._missing(assignment, function):
            return False
        self._ahead[lease_id] = runner
        invocation = self._prepare(assignment, function, bundle, runner)
        runner.send_ahead(invocation)
        return True

    def has_ahead(self, lease_id: str) -> bool:
        """Whether leases were sent to the process of a running one, to come after it."""
        found = self._running.get(lease_id)
        return found is not None and bool(found[0].ahead)

    def take_back(self, lease_id: str) -> bool:
        """Make sure that a lease whose turn has not come is never begun, and forget it; False when it was."""
        runner = self._ahead.get(lease_id)
        if runner is None or lease_id not in runner.ahead or runner.take_back(lease_id):
            self._ahead.pop(lease_id, None)
            self._upstream.pop(lease_id, None)
            return True
        return False

    def stop(self, lease_id: str, kind: str, message: str) -> None:
        """End a running lease as a failure of this kind."""
        answer = {"kind": "result", "failure": {"kind": kind, "message": message}, "duration": 0.0}
        if (codeless := self._codeless.pop(lease_id, None)) is not None:
            self._end(codeless, answer, [])
            return
        found = self._starting.pop(lease_id, None)
        if found is not None:
            starting, assignment = found
            starting.cancel()
            self._end(assignment, answer, [])
            return
        running = self._running.get(lease_id)
        if running is None:
            if (sent := self._ahead.get(lease_id)) is None or lease_id not in sent.ahead:
                return
            running = (sent, sent.ahead[lease_id])
        runner, invocation = running
        if invocation.ending is not None:
            return
        invocation.ending = answer
        if runner.key.is_async:
            runner.cancel(lease_id)
            # A coroutine that goes on is abandoned by its process, unless it blocks that.
            self._cancel_timer(lease_id)
            self._timers[lease_id] = asyncio.get_running_loop().call_later(CANCEL_GRACE_S, runner.kill_blocked)
        else:
            runner.kill()

    def cancelled(self, assignment: worker_pb2.Assignment) -> None:
        """Report a lease that was ended before it started."""
        failure = {"kind": "cancelled", "message": "cancelled before it started"}
        self._fail(assignment, failure)

    async def _start_cold(
        self,
        assignment: worker_pb2.Assignment,
        function: task_pb2.Function,
        bundle: str,
        key: Key,
        missing: list[asyncio.Task[Any]],
    ) -> None:
        failure = {}
        try:
            for wait in missing:
                # Others may wait for the same.
                await asyncio.shield(wait)
            runner = await self._pool.take(key)
        except OSError as error:
            failure = {"kind": "resources", "message": f"a process could not be started: {error}"}
        except SandboxError as error:
            failure = {"kind": "sandbox_setup", "message": str(error)}
        except MissingError as error:
            failure = {"kind": "payload", "message": str(error)}
        except Exception as error:
            # Such as a bundle that is no archive. Whatever it is, a lease that was taken has to end.
            text = f"what it needs could not be made ready: {type(error).__name__}: {error}"
            failure = {"kind": "payload", "message": text}
        if failure:
            self._starting.pop(assignment.lease_id, None)
            self._fail(assignment, failure)
            return
        self._starting.pop(assignment.lease_id, None)
        self._run(assignment, function, bundle, runner)

    def _needs(self, assignment: worker_pb2.Assignment) -> tuple[task_pb2.Function, str, Key]:
        function = self._functions[assignment.function_digest]
        bundle = self._bundles.path(function.bundle_digest)
        isolation = ISOLATIONS.get(assignment.isolation, "")
        is_async = function.python.concurrency == task_pb2.CONCURRENCY_ASYNC and not isolation
        is_alone = function.python.concurrency == task_pb2.CONCURRENCY_FRESH_PROCESS or self._is_suspect(assignment)
        owner = assignment.lease_id if is_alone or isolation else ""
        gpus, threads = tuple(assignment.gpu_indices), max(1, math.ceil(assignment.resources.cpu))
        return function, bundle, Key(assignment.tenant, bundle, gpus, is_async, owner, isolation, threads)

    def _is_suspect(self, assignment: worker_pb2.Assignment) -> bool:
        return any((attempt.run_id, attempt.task_id) in self._suspects for attempt in assignment.attempts)

    def _missing(self, assignment: worker_pb2.Assignment, function: task_pb2.Function) -> list[asyncio.Task[Any]]:
        upstream = self._upstream.get(assignment.lease_id, {})
        return self._materials.missing(function.bundle_digest, assignment, upstream)

    def _run(self, assignment: worker_pb2.Assignment, function: task_pb2.Function, bundle: str, runner: Runner) -> None:
        try:
            invocation = self._prepare(assignment, function, bundle, runner)
        except InputError as error:
            runner.kill()
            self._fail(assignment, {"kind": "payload", "message": str(error)})
            return
        self._begin(assignment, runner, invocation)
        runner.invoke(invocation)

    def _prepare(
        self, assignment: worker_pb2.Assignment, function: task_pb2.Function, bundle: str, runner: Runner
    ) -> Invocation:
        lease_id = assignment.lease_id
        if function.digest not in runner.known:
            runner.define(function.digest, *convert.function_frame(function, bundle))
        blobs: list[bytes] = []
        store = self._materials.directory
        # Kept until the lease is over: one that was sent ahead may come back and be sent again.
        upstream = self._upstream.get(lease_id, {})
        header: dict[str, Any] = {
            "kind": "invoke",
            "id": lease_id,
            "digest": function.digest,
            "attempts": [[attempt.run_id, attempt.task_id, attempt.number] for attempt in assignment.attempts],
            "items": [
                # A map of the contract has no order; a function that takes any inputs gets them by name.
                {name: convert.binding_tree(a.inputs[name], store, blobs, upstream) for name in sorted(a.inputs)}
                for a in assignment.attempts
            ],
            "batched": assignment.batched,
            "outputs": list(assignment.outputs),
            "split": list(assignment.split_outputs),
            # Coroutines share a process, where nobody can tell whose memory it is.
            "memory_limit": 0 if runner.key.is_async else assignment.resources.memory_bytes,
            "store": store,
            "folder": runner.folder,
            "inline_limit": self.inline_limit_bytes,
            "log_limit": self.log_limit_bytes,
            "question_limit": self.questions.limit_bytes,
        }
        if runner.sandbox is not None:
            header["items"] = [
                {name: inlined(found, blobs) for name, found in item.items()} for item in header["items"]
            ]
            header |= {"store": "", "folder": "", "inline_limit": LARGEST_INLINE_BYTES}
        return Invocation(
            lease_id,
            header,
            blobs,
            on_log=lambda stream, text, truncated: self._log(lease_id, stream, text, truncated),
            on_spawn=lambda task, parts: self._spawn(lease_id, function, task, parts),
            on_ask=lambda asked, parts: self.questions.ask(assignment, runner, asked, parts),
            on_end=lambda answer, parts: self._end(assignment, answer, parts),
            on_refused=lambda: self._start_again(assignment),
            on_given_back=lambda reason, is_suspect: self._give_back(assignment, reason, is_suspect=is_suspect),
            screen=None
            if runner.sandbox is None
            else lambda answer, parts: screened(answer, parts, store, runner.folder, self.inline_limit_bytes),
            raw_left=self.log_limit_bytes,
        )

    def _begin(self, assignment: worker_pb2.Assignment, runner: Runner, invocation: Invocation) -> None:
        lease_id = assignment.lease_id
        _note("the attempt starts", assignment)
        self._running[lease_id] = (runner, invocation)
        self._unstarted[lease_id] = time.time_ns()
        if self._start_timer is None:
            self._start_timer = asyncio.get_running_loop().call_later(START_DELAY_S, self._tell_starts)
        if assignment.HasField("timeout") or runner.sandbox is not None:
            seconds = assignment.timeout.seconds + assignment.timeout.nanos / 1e9
            if not seconds and runner.sandbox is not None:
                seconds = runner.sandbox.policy.time_s
            # What a process takes to start up is not the attempt's time.
            runner.when_ready(lambda: self._start_clock(lease_id, seconds))

    def _start_clock(self, lease_id: str, seconds: float) -> None:
        if lease_id in self._running and lease_id not in self._timers:
            text = f"the attempt ran longer than {seconds:g} s"
            timer = asyncio.get_running_loop().call_later(seconds, self.stop, lease_id, "timeout", text)
            self._timers[lease_id] = timer

    def _tell_starts(self) -> None:
        self._start_timer = None
        starts, self._unstarted = self._unstarted, {}
        for lease_id, began_ns in starts.items():
            self._tell_start(lease_id, began_ns)

    def _tell_start(self, lease_id: str, began_ns: int) -> None:
        report = convert.report(lease_id, began_ns)
        report.started.SetInParent()
        self._emit(report)

    def _log(self, lease_id: str, stream: str, text: str, truncated: bool) -> None:
        for start in range(0, len(text), LOG_CHARACTERS):
            report = convert.report(lease_id, time.time_ns())
            report.log.stream = convert.log_stream(stream)
            report.log.text = text[start : start + LOG_CHARACTERS]
            report.log.truncated = truncated
            self._emit(report)

    def _spawn(self, lease_id: str, function: task_pb2.Function, task: dict[str, Any], blobs: list[bytes]) -> None:
        report = convert.report(lease_id, time.time_ns())
        report.spawned.CopyFrom(convert.spawned_from_frame(task, blobs, function, self._materials.name))
        if excess := convert.excess(report, self.message_limit_bytes):
            self._materials.drop(convert.artifacts_in(report))
            self.stop(lease_id, "payload", excess)
        else:
            self._emit(report)

    def _start_again(self, assignment: worker_pb2.Assignment) -> None:
        """Start a lease that its process did not begin."""
        self._cancel_timer(assignment.lease_id)
        self._running.pop(assignment.lease_id, None)
        self.start(assignment)

    def _give_back(self, assignment: worker_pb2.Assignment, reason: str, *, is_suspect: bool) -> None:
        """Give back a lease whose process another one took down."""
        if is_suspect:
            self._suspect(assignment)
        if (began_ns := self._unstarted.pop(assignment.lease_id, None)) is not None:
            # It may have begun, so its attempts must not have the same numbers again.
            self._tell_start(assignment.lease_id, began_ns)
        self._emit(convert.returned(assignment.lease_id, reason))
        self._forget(assignment.lease_id)
        self._ended(assignment.lease_id, None)

    def _suspect(self, assignment: worker_pb2.Assignment) -> None:
        """Have the tasks of a lease that may have taken its process down run in processes of their own from now on."""
        for attempt in assignment.attempts:
            self._suspects[attempt.run_id, attempt.task_id] = None
        while len(self._suspects) > MAX_SUSPECTS:
            del self._suspects[next(iter(self._suspects))]

    def _fail(self, assignment: worker_pb2.Assignment, failure: dict[str, Any]) -> None:
        self._end(assignment, {"failure": failure, "duration": 0.0}, [])

    def _end(self, assignment: worker_pb2.Assignment, answer: dict[str, Any], blobs: list[bytes]) -> None:
        """Report the end of every member of a lease."""
        lease_id = assignment.lease_id
        _note("the attempt ended", assignment)
        self._forget(lease_id)
        if convert.has_crashed(answer):
            self._suspect(assignment)
        asked = (lease_id, answer, blobs, self._materials.name, len(assignment.attempts), self.message_limit_bytes)
        if len(blobs) < LARGE_ANSWER_BLOBS and sum(map(len, blobs)) < LARGE_ANSWER_BYTES:
            self._report_end(lease_id, answer, convert.outcomes(*asked))
            return
        # The loop has heartbeats to send, and other leases to look after, while a large answer is converted.
        task = asyncio.get_running_loop().create_task(self._end_large(asked, answer))
        self._converting.add(task)
        task.add_done_callback(self._converting.discard)

    async def _end_large(self, asked: tuple[Any, ...], answer: dict[str, Any]) -> None:
        try:
            reports = await asyncio.to_thread(convert.outcomes, *asked)
        except RuntimeError:  # The machine is short of threads.
            reports = convert.outcomes(*asked)
        self._report_end(asked[0], answer, reports)

    def _report_end(self, lease_id: str, answer: dict[str, Any], reports: list[worker_pb2.Report]) -> None:
        outputs: convert.Outputs | None = None
        named: set[str] = set()
        for report in reports:
            outputs = report.succeeded.outputs if report.HasField("succeeded") else None
            named |= convert.artifacts_in(report)
            self._emit(report)
        # Values of an answer that could not be reported are named by nothing.
        if unnamed := set(answer.get("made", ())) - named:
            with contextlib.suppress(OSError):
                self._materials.drop(unnamed)
        self._ended(lease_id, outputs)

    def _forget(self, lease_id: str) -> None:
        self._running.pop(lease_id, None)
        self._ahead.pop(lease_id, None)
        self._unstarted.pop(lease_id, None)
        self._upstream.pop(lease_id, None)
        self.questions.forget(lease_id)
        self._cancel_timer(lease_id)

    def _cancel_timer(self, lease_id: str) -> None:
        if (timer := self._timers.pop(lease_id, None)) is not None:
            timer.cancel()


def _note(what: str, assignment: worker_pb2.Assignment) -> None:
    if log.isEnabledFor(logging.DEBUG):
        log.debug(what, extra=_named(assignment))


def _named(assignment: worker_pb2.Assignment) -> dict[str, object]:
    """Return what a log line about a lease names; of a batch it is the first attempt."""
    first = assignment.attempts[0] if assignment.attempts else worker_pb2.Attempt()
    named = {"run_id": first.run_id, "task_id": first.task_id, "attempt": first.number}
    return {"lease_id": assignment.lease_id, **named}
