"""Owns the answers to requests with a `request_id`. Rule: a repeated request gets the first answer."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import Message

from lattice_server import background
from lattice_server.core.errors import ConflictError
from lattice_server.engine.slices import Slices
from lattice_server.rpc import callers
from lattice_server.rpc.convert.tasks import check_request_id
from lattice_server.rpc.fingerprints import request_fingerprint

Response = TypeVar("Response", bound=Message)
Key = tuple[str, str, str, str]  # The subject and its tenant, the kind of request, and its id.

KEPT_S = 3600.0
MAX_ANSWERS = 10_000
MAX_BYTES = 64 * 1024 * 1024


@dataclass(slots=True)
class _Answer:
    fingerprint: str
    given: asyncio.Future[Any]
    asked_at: float
    size_bytes: int = 0


class RequestCache:
    """The answers of the last `kept_s` seconds by request id, oldest first, within limits of number and bytes."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        max_answers: int = MAX_ANSWERS,
        max_bytes: int = MAX_BYTES,
        slices: Slices | None = None,
        kept_s: float = KEPT_S,
    ) -> None:
        self._slices = slices or Slices()
        self._clock = clock
        self._kept_s = kept_s
        self._max_answers = max_answers
        self._max_bytes = max_bytes
        self._answers: OrderedDict[Key, _Answer] = OrderedDict()
        self._size_bytes = 0

    async def once(self, request: Any, make: Callable[[], Coroutine[Any, Any, Response]]) -> Response:
        """Carry out a request and return its answer, or return the answer that the same request got before.

        A request continues when its caller disconnects, and a repetition waits for its end. A failed request is not
        remembered.

        Args:
            request: a message with the field `request_id`; without one it is carried out each time.
            make: carries it out; may change the request.

        Raises:
            ConflictError: REQUEST_ID_CONFLICT, the id was used with other content.
            LatticeError: what `make` raises.
        """
        if not request.request_id:
            return await make()
        check_request_id(request.request_id)
        caller = callers.caller()
        # By subject and tenant: an answer must not show one caller the work of another.
        key = (caller.subject, callers.reach().tenant, request.DESCRIPTOR.full_name, request.request_id)
        fingerprint = await request_fingerprint(request, self._slices)
        self._forget()
        known = self._answers.get(key)
        if known is None:
            task = background.share(make())
            known = self._answers[key] = _Answer(fingerprint, task, self._clock())
            task.add_done_callback(partial(self._settle, key, known))
        elif known.fingerprint != fingerprint:
            text = f"request {request.request_id!r} was made with other content"
            raise ConflictError("REQUEST_ID_CONFLICT", text)
        answer: Response = await asyncio.shield(known.given)
        return answer

    def _settle(self, key: Key, answer: _Answer, given: asyncio.Future[Any]) -> None:
        if self._answers.get(key) is not answer:
            return
        if given.cancelled() or given.exception() is not None:
            del self._answers[key]
            return
        answer.size_bytes = given.result().ByteSize()
        self._size_bytes += answer.size_bytes
        self._forget()

    def _forget(self) -> None:
        """Drop answers that are too old or exceed a limit, oldest first, up to the first request still in progress."""
        oldest = self._clock() - self._kept_s
        while self._answers:
            key, answer = next(iter(self._answers.items()))
            is_too_much = len(self._answers) > self._max_answers or self._size_bytes > self._max_bytes
            if not answer.given.done() or not (is_too_much or answer.asked_at < oldest):
                return
            self._size_bytes -= answer.size_bytes
            del self._answers[key]
