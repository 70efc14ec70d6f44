"""Owns the digests of functions and bundles that a server has.

Rule: the newest MAX_DIGESTS are known; others are sent again.
"""

from collections.abc import Iterable

from lattice.v1 import task_pb2

MAX_DIGESTS = 10_000


class KnownCode:
    """A bounded set of digests. A digest that was dropped costs one transfer of its code."""

    def __init__(self) -> None:
        # In the order of their last use; the values are not used.
        self._digests: dict[str, None] = {}

    def __contains__(self, digest: object) -> bool:
        return digest in self._digests

    def __len__(self) -> int:
        return len(self._digests)

    def add(self, digest: str) -> None:
        """Add a digest, or note its use."""
        self._digests.pop(digest, None)
        self._digests[digest] = None
        while len(self._digests) > MAX_DIGESTS:
            self._digests.pop(next(iter(self._digests)), None)

    def note_sent(self, functions: Iterable[task_pb2.Function]) -> None:
        """Add functions that the server has accepted, and their bundles."""
        for function in functions:
            self.add(function.digest)
            if function.bundle_digest:
                self.add(function.bundle_digest)

    def clear(self) -> None:
        """Forget all."""
        self._digests.clear()
