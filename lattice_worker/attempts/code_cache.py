"""The functions and bundles that leases name. Rule: a bundle is deleted only when no runner imports from it."""

from collections.abc import Iterable

from lattice.v1 import task_pb2

from lattice_worker.pool.runner_pool import Pool
from lattice_worker.store.bundles import Bundles


class CodeCache:
    """Functions by digest, and the bundles they import from."""

    def __init__(self, bundles: Bundles, pool: Pool) -> None:
        self.bundles = bundles
        self._pool = pool
        self._functions: dict[str, task_pb2.Function] = {}
        self._stale: set[str] = set()
        pool.retired, pool.on_gone = bundles.retired, self.drop_bundles

    def get(self, digest: str) -> task_pb2.Function | None:
        """Return a function, if it is here."""
        return self._functions.get(digest)

    def learn(self, functions: list[task_pb2.Function], bundles: list[task_pb2.CodeBundle]) -> None:
        """Take code for later assignments."""
        self._stale.difference_update(function.digest for function in functions)
        self._stale.difference_update(bundle.digest for bundle in bundles)
        for function in functions:
            self._functions[function.digest] = function
        self.bundles.learn(bundles)

    def forget(self, digests: Iterable[str]) -> None:
        """Drop functions, here and in the runners, and bundles together with the runners that have them."""
        for digest in digests:
            self._functions.pop(digest, None)
        self.bundles.retire(digests)
        self._pool.forget(digests)
        self.drop_bundles()

    def renew(self) -> None:
        """Drop the code that the server has not sent again on the stream that ended.

        A new stream begins: the server sends the code again that it uses, and names no other code to be dropped. To
        drop all code at once would end runners that are soon used again.
        """
        self.forget(self._stale)
        self._stale = self._functions.keys() | self.bundles.known

    def drop_bundles(self) -> None:
        """Delete the retired bundles that no runner uses."""
        self.bundles.drop_unused(self._pool.uses)
