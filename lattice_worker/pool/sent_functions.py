"""Which functions a runner has. Rule: a runner drops a function only when no invocation of it runs or is pipelined."""

from collections.abc import Callable, Iterable
from typing import Any


class SentFunctions:
    """The functions of one runner, by digest. `send` sends it a frame; `called` returns the digests in use."""

    def __init__(self, send: Callable[..., None], called: Callable[[], set[str]]) -> None:
        self._send, self._called = send, called
        self._known: set[str] = set()
        self._unneeded: set[str] = set()

    def define(self, digest: str, frame: Callable[[], tuple[dict[str, Any], bytes]]) -> None:
        """Send a function unless the runner has it. `frame` makes the frame, which has one blob."""
        if digest not in self._known:
            header, blob = frame()
            self._known.add(digest)
            self._send(header, [blob])

    def forget(self, digests: Iterable[str]) -> None:
        """Have the runner drop functions: those in use as soon as they are not."""
        self._unneeded |= self._known.intersection(digests)
        self.drop_unneeded()

    def drop_unneeded(self) -> None:
        """Have the runner drop the functions that are to be forgotten and not in use any more."""
        if self._unneeded and (dropped := self._unneeded - self._called()):
            self._unneeded -= dropped
            self._known -= dropped
            self._send({"kind": "forget", "digests": sorted(dropped)})
