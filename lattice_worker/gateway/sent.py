"""A request on its way to an engine or a provider, and the facts that its answer tells."""

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lattice_worker.gateway.limits import told_limits
from lattice_worker.gateway.refusals import LimitedError, is_limit, retry_after_s
from lattice_worker.gateway.routing import Route
from lattice_worker.gateway.usage import Usage


@dataclass(slots=True)
class Sent:
    """One request.

    Attributes:
        body: the body of the caller's request.
        note: is called with the limits in the head of the answer to a permitted request; None for a model without a
            budget.
        counts_tokens: whether its budget has a limit of tokens.
        is_last: whether it is not made again, so that its caller gets any answer.
        usage: the tokens that it used.
        limited: that it was refused because of a limit.
    """

    body: dict[str, Any]
    note: Callable[[Mapping[str, Sequence[float]]], None] | None = None
    counts_tokens: bool = False
    is_last: bool = True
    usage: Usage = field(default_factory=Usage)
    limited: LimitedError | None = None

    @property
    def hides_usage(self) -> bool:
        """Whether a stream is asked for its use of tokens on behalf of the gateway only."""
        asked = self.body.get("stream_options")
        return self.counts_tokens and not (isinstance(asked, dict) and asked.get("include_usage"))

    def body_for(self, route: Route, path: str) -> dict[str, Any]:
        """Return the body for an engine; a stream that counts is asked to report its use."""
        found = {**self.body, "model": route.model or self.body["model"]}
        if self.counts_tokens and self.body.get("stream") and path.endswith("/completions"):
            asked = self.body.get("stream_options")
            found["stream_options"] = {**(asked if isinstance(asked, dict) else {}), "include_usage": True}
        return found

    def note_answer(self, headers: Mapping[str, str]) -> None:
        """Note that an answer begins."""
        if self.note is not None:
            self.note(told_limits({name.lower(): value for name, value in headers.items()}, time.time()))

    def note_whole(self, status: int, headers: Mapping[str, str], whole: bytes) -> None:
        """Take a whole answer. Raises LimitedError when it is to be made again later."""
        told = {name.lower(): value for name, value in headers.items()}
        if self.note is not None and is_limit(status, told, whole):
            self.limited = LimitedError(retry_after_s(told))
            if not self.is_last:
                raise self.limited
        if self.counts_tokens:
            with contextlib.suppress(ValueError):
                found = json.loads(whole)
                if isinstance(found, dict):
                    self.usage.note(found)
