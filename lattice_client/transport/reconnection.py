"""Owns reconnecting while a server cannot be reached. Rule: one policy for every call that waits for a run.

Such a call is repeated with backoff for RECONNECT_S after its connection broke. Any message from the server resets that
time. Afterwards the call fails with UnavailableError; the run itself may continue.
"""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc

from lattice_client import errors
from lattice_client.transport.channel import Channel, LimitReachedError
from lattice_client.transport.requests import check_wait

# How long a call is repeated while the server cannot be reached.
RECONNECT_S = 30.0
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.1, 5.0
RESUMABLE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED})

OnLoss = Callable[[errors.RequestError], None]


class Reconnection:
    """The reconnections of one call that waits for a run. `on_loss` is called once for each broken connection."""

    def __init__(
        self, rpc: Channel, run_id: str, on_loss: OnLoss | None = None, max_backoff_s: float = MAX_BACKOFF_S
    ) -> None:
        self._rpc = rpc
        self._max_backoff_s = max_backoff_s
        self._run_id = str(run_id)
        self._on_loss = on_loss
        self._lost_at: float | None = None
        self._tries = 0

    def succeeded(self) -> None:
        """Note that the server answered."""
        self._lost_at, self._tries = None, 0

    async def wait(self, error: errors.RequestError) -> None:
        """Wait for the backoff before the call is repeated. Raises the error of a final failure, LimitReachedError."""
        # An error with a reason comes from the server and is final; one without comes from gRPC's broken stream.
        if error.code not in RESUMABLE or (isinstance(error, errors.InternalError) and error.reason):
            try:
                raise _final(error) from None
            finally:
                del error  # its traceback refers to this frame
        now = self._rpc.now()
        if self._lost_at is None:
            self._lost_at = now
            if self._on_loss is not None:
                self._on_loss(error)
        self._tries += 1
        left_s = self._lost_at + RECONNECT_S - now
        if left_s <= 0:
            raise self._given_up(error) from None
        # Random, so that the readers of a server that returns do not all call it at once.
        backoff_s = min(self._max_backoff_s, MIN_BACKOFF_S * 2 ** min(self._tries - 1, 10))
        await self._rpc.sleep(min(left_s, random.uniform(0, backoff_s)))

    def _given_up(self, error: errors.RequestError) -> errors.RequestError:
        text = (
            f"run {self._run_id!r} cannot be read: {self._tries} tries in {RECONNECT_S:.0f} s to reach the server "
            f"at {self._rpc.target} failed, the last with: {error}. The run may still be running: "
            f"read it again with get_run({self._run_id!r}) when the server answers"
        )
        found = errors.UnavailableError(text, error.reason)
        found.advice = error.advice
        return found


def _final(error: errors.RequestError) -> errors.RequestError:
    """Return a final error; for a run that does not exist any more its text says how that can be."""
    if not isinstance(error, errors.NotFoundError) or error.reason == "TASK_NOT_FOUND":
        return error
    text = f"{error}; a server without a journal forgets all runs at its end, and the oldest ended runs are deleted"
    return errors.NotFoundError(text, error.reason, error.metadata)


@asynccontextmanager
async def limited(
    rpc: Channel, run_id: str, timeout: float | None, task_id: str = "", allowed_s: float | None = None
) -> AsyncIterator[None]:
    """Limit the duration of a block that waits for a run, or for one of its tasks. Raises TimeoutError.

    `allowed_s` is the limit that the error names, for a block that has only the rest of it. Raises TypeError when a
    limit is not a number.
    """
    check_wait(timeout)
    try:
        async with rpc.limit(timeout):
            yield
    except LimitReachedError:
        raise _timed_out(run_id, timeout if allowed_s is None else allowed_s, task_id) from None


def _timed_out(run_id: str, timeout: float | None, task_id: str = "") -> TimeoutError:
    """Return the error of a wait for a run, or for one of its tasks, that reached its limit."""
    if task_id:
        text = f"task {task_id!r} of run {str(run_id)!r} did not end within {timeout:g} s"
        return TimeoutError(f"{text}; the run continues: wait again, or cancel it")
    return TimeoutError(f"run {str(run_id)!r} did not end within {timeout:g} s; it continues: wait again, or cancel it")
