"""Owns the code that callers sent, by its digest within a tenant.

Rule: code is found for as long as something refers to it, such as a run, a stored workflow or a lease. Other code is
kept up to a limit, and the code used longest ago goes first. A digest alone finds nothing that only other tenants sent.
"""

from collections import OrderedDict
from typing import Any
from weakref import WeakValueDictionary

from lattice_server.core.errors import PreconditionError
from lattice_server.core.model import Function
from lattice_server.core.tenancy import UNNAMED, Reach, Shelf, key_of

CODE_LIMIT_BYTES = 256 * 1024 * 1024
WORKER_CODE_BYTES = 32 * 1024 * 1024


class CodeStore:
    """Functions and bundles by digest. A function is one object, whichever tenants sent it."""

    def __init__(self, limit_bytes: int = CODE_LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._size_bytes = 0
        self._kept: Shelf[tuple[Any, int]] = Shelf()
        self._referred: WeakValueDictionary[str, Function] = WeakValueDictionary()
        self._sent: WeakValueDictionary[str, Function] = WeakValueDictionary()  # By the keys of tenants that sent it.

    def find(self, digest: str) -> Function | None:
        """Return a function that something refers to, or that is kept, for a worker; None when there is none."""
        return self._referred.get(digest)

    def get(self, digest: str, reach: Reach = UNNAMED) -> Any:
        """Return what has this digest and is within reach. Raises PreconditionError: FUNCTION_MISSING."""
        key = key_of(digest, reach.tenant)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        if (sent := self._sent.get(key)) is not None:
            return sent
        if reach.is_any:
            if (kept := self._kept.find(digest, reach)) is not None:
                return kept[0]
            if (found := self._referred.get(digest)) is not None:
                return found
        message = f"code {digest} is not known here; send it"
        raise PreconditionError("FUNCTION_MISSING", message, metadata={"digest": digest})

    def put(self, digest: str, code: Any, size_bytes: int, tenant: str = "") -> Any:
        """Keep code that a tenant sent under its digest; return the object that stands for this code."""
        key = key_of(digest, tenant)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        if isinstance(code, Function):
            code = self._referred.setdefault(digest, code)
            self._sent[key] = code
        self._kept[key] = (code, size_bytes)
        self._size_bytes += size_bytes
        while self._size_bytes > self._limit_bytes and len(self._kept) > 1:
            _, (_, freed) = self._kept.popitem(last=False)
            self._size_bytes -= freed
        return code


class SentCode:
    """The code that a worker has: what one stream has carried and the worker was not told to forget.

    Functions are counted, and those used longest ago are forgotten beyond a limit. Bundles stay: they are unpacked
    where other workers of the same machine use them too.
    """

    def __init__(self, limit_bytes: int = WORKER_CODE_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._size_bytes = 0
        self._functions: OrderedDict[str, int] = OrderedDict()
        self._bundles: set[str] = set()

    def __contains__(self, digest: str) -> bool:
        return digest in self._functions or digest in self._bundles

    def use(self, digest: str) -> bool:
        """Note that a function is called; return whether the worker has it."""
        if digest not in self._functions:
            return False
        self._functions.move_to_end(digest)
        return True

    def add_function(self, digest: str, size_bytes: int) -> None:
        """Note that a function is sent."""
        self._functions[digest] = size_bytes
        self._size_bytes += size_bytes

    def add_bundle(self, digest: str) -> None:
        """Note that a bundle is sent."""
        self._bundles.add(digest)

    def discard(self, digest: str) -> None:
        """Note that the worker does not have a function."""
        self._size_bytes -= self._functions.pop(digest, 0)

    def take_excess(self) -> list[str]:
        """Return the functions that the worker is to forget, and count them as forgotten."""
        forgotten = []
        while self._size_bytes > self._limit_bytes and len(self._functions) > 1:
            digest, size_bytes = self._functions.popitem(last=False)
            self._size_bytes -= size_bytes
            forgotten.append(digest)
        return forgotten
