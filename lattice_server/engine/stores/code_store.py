"""Owns the code that callers sent, by its digest within a tenant.

Rule: code that stored workflows and live runs reference is kept. Other code is kept while there is room, and the code
used longest ago is evicted first. New code that does not fit after that is refused.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from lattice_server.core.errors import PreconditionError
from lattice_server.core.model import Bundle, Function
from lattice_server.core.tenancy import UNNAMED, Reach
from lattice_server.engine.stores.store_folder import MIB
from lattice_server.engine.stores.usage import Bound, Evictable, Usage

CODE_BOUND = Bound(512 * MIB, share=0.5)
WORKER_CODE_BYTES = 64 * MIB
RETRY_AFTER_S = 1.0

Code = Function | Bundle
C = TypeVar("C", bound=Function | Bundle)


@dataclass(slots=True)
class _Kept:
    code: Code
    holders: int = 0


class CodeStore:
    """Functions and bundles by tenant and digest. Equal ones of several tenants are one object, and count for each."""

    def __init__(self, bound: Bound = CODE_BOUND) -> None:
        self.usage = Usage("code", bound)
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._evictable = Evictable(self.usage)
        self._referred: WeakValueDictionary[str, Code] = WeakValueDictionary()

    def find(self, digest: str) -> Code | None:
        """Return code of any tenant that something references, such as a lease; None when there is none."""
        return self._referred.get(digest)

    def get(self, digest: str, reach: Reach = UNNAMED) -> Any:
        """Return the code that has this digest and is within reach.

        Raises:
            PreconditionError: FUNCTION_MISSING, there is none.
        """
        if (kept := self._kept.get((reach.tenant, digest))) is not None:
            found = self._used(reach.tenant, kept)
        else:
            found = self._referred.get(digest) if reach.is_any else None
        if found is None:
            message = f"code {digest} is not known here; send it"
            raise PreconditionError("FUNCTION_MISSING", message, metadata={"digest": digest})
        return found

    def put(self, code: C, tenant: str = "") -> C:
        """Keep code of a tenant under its digest; return the equal object that is kept already, or this one.

        Raises:
            ExhaustedError: STORE_FULL, the tenant or all tenants reference too much code.
        """
        name = (tenant, code.digest)
        if (kept := self._kept.get(name)) is None:
            refusal = self.usage.refusal(tenant, code.size_bytes)
            kept = self._kept[name] = _Kept(self._referred.setdefault(code.digest, code))
            self.usage.hold(*name, code.size_bytes)
            self._evictable.add(*name)
            self._evict(tenant)
            if name not in self._kept and refusal is not None:
                refusal.retry_after_s = RETRY_AFTER_S
                raise refusal
        found: C = self._used(tenant, kept)
        return found

    def hold(self, tenant: str, functions: Iterable[Function]) -> None:
        """Add one reference of a tenant to each function and its bundle.

        Raises:
            ExhaustedError: STORE_FULL, the tenant or all tenants reference too much code; then no reference is added.
        """
        held: list[str] = []
        try:
            for code in _parts(functions):
                # It may have been evicted since it was sent.
                self.put(code, tenant)
                self._kept[tenant, code.digest].holders += 1
                self._evictable.discard(tenant, code.digest)
                held.append(code.digest)
        except BaseException:
            self._release(tenant, held)
            raise

    def release(self, tenant: str, functions: Iterable[Function]) -> None:
        """Release one reference to each function and its bundle; code without references may be evicted."""
        self._release(tenant, [code.digest for code in _parts(functions)])

    def _release(self, tenant: str, digests: Iterable[str]) -> None:
        for digest in digests:
            kept = self._kept[tenant, digest]
            kept.holders -= 1
            self._used(tenant, kept)

    def _used(self, tenant: str, kept: _Kept) -> Any:
        if not kept.holders:
            self._evictable.add(tenant, kept.code.digest)
        return kept.code

    def _evict(self, tenant: str) -> None:
        while (victim := self._evictable.victim(tenant)) is not None:
            self._evictable.discard(*victim)
            self.usage.release(*victim)
            del self._kept[victim]


def _parts(functions: Iterable[Function]) -> Iterator[Code]:
    for function in functions:
        if function.bundle is not None:
            yield function.bundle
        yield function


class SentCode:
    """The code that a worker has: it was sent on one stream, and the worker was not told to forget it.

    Beyond a limit the functions used longest ago are forgotten, and each bundle with the last of its functions.
    """

    def __init__(self, limit_bytes: int = WORKER_CODE_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._size_bytes = 0
        self._functions: OrderedDict[str, Function] = OrderedDict()
        self._bundles: dict[str, set[str]] = {}  # The functions of each.

    def __contains__(self, digest: str) -> bool:
        return digest in self._functions or digest in self._bundles

    def use(self, digest: str) -> bool:
        """Note that a function is called; return whether the worker has it."""
        if digest not in self._functions:
            return False
        self._functions.move_to_end(digest)
        return True

    def add(self, function: Function) -> None:
        """Note that a function is sent, and its bundle if the worker did not have it."""
        self._functions[function.digest] = function
        self._size_bytes += function.size_bytes
        if (bundle := function.bundle) is not None:
            if bundle.digest not in self._bundles:
                self._bundles[bundle.digest] = set()
                self._size_bytes += bundle.size_bytes
            self._bundles[bundle.digest].add(function.digest)

    def discard(self, digest: str) -> None:
        """Note that the worker does not have a function."""
        if (function := self._functions.pop(digest, None)) is not None:
            self._size_bytes -= function.size_bytes
            if function.bundle is not None:
                self._bundles[function.bundle.digest].discard(digest)

    def take_excess(self) -> list[str]:
        """Return the functions and bundles that the worker is to forget, and count them as forgotten."""
        forgotten = []
        while self._size_bytes > self._limit_bytes and len(self._functions) > 1:
            digest, function = self._functions.popitem(last=False)
            self._size_bytes -= function.size_bytes
            forgotten.append(digest)
            if (bundle := function.bundle) is not None:
                self._bundles[bundle.digest].discard(digest)
                if not self._bundles[bundle.digest]:
                    del self._bundles[bundle.digest]
                    self._size_bytes -= bundle.size_bytes
                    forgotten.append(bundle.digest)
        return forgotten
