"""Code by its digest: how long it is found here, and how much of it a worker keeps."""

import gc

import pytest

from lattice_server.core.errors import ExhaustedError, PreconditionError
from lattice_server.core.model import Bundle, Function
from lattice_server.core.tenancy import EVERYTHING, Reach
from lattice_server.engine.stores.code_store import CodeStore, SentCode
from lattice_server.engine.stores.usage import Bound

A, B = "tenant-a", "tenant-b"


def function(digest: str, size_bytes: int = 10, bundle: Bundle | None = None) -> Function:
    return Function(digest, False, None, bundle, size_bytes=size_bytes)


def is_kept(store: CodeStore, tenant: str, digest: str) -> bool:
    try:
        store.get(digest, Reach(tenant))
    except PreconditionError:
        return False
    return True


def test_the_code_used_longest_ago_is_evicted_first_when_there_is_too_much() -> None:
    store = CodeStore(Bound(20))
    for digest in "ab":
        store.put(function(digest), A)
    store.get("a", Reach(A))
    store.put(function("c"), A)
    assert [is_kept(store, A, digest) for digest in "abc"] == [True, False, True]
    with pytest.raises(PreconditionError) as caught:
        store.get("b", Reach(A))
    assert (caught.value.reason, caught.value.metadata) == ("FUNCTION_MISSING", {"digest": "b"})


def test_code_is_kept_while_it_is_held() -> None:
    store, held = CodeStore(Bound(20)), function("a", bundle=Bundle("bundle", None, 5))
    store.hold(A, [held])
    store.hold(A, [held])
    store.put(function("b", 5), A)
    store.put(function("c", 5), A)
    assert [is_kept(store, A, digest) for digest in ("a", "bundle", "b", "c")] == [True, True, False, True]
    store.release(A, [held])
    store.get("a", Reach(A))
    for digest in "dfgh":
        store.put(function(digest, 5), A)
    assert is_kept(store, A, "a"), "held once more"
    store.release(A, [held])
    store.put(function("e", 15), A)
    assert not is_kept(store, A, "a")
    assert store.usage.total == 15


def test_code_is_refused_when_referenced_code_fills_the_store() -> None:
    store = CodeStore(Bound(100, share=0.5))
    store.hold(A, [function("a", 30)])
    with pytest.raises(ExhaustedError) as caught:
        store.put(function("b", 21), A)
    assert (caught.value.reason, caught.value.retry_after_s) == ("STORE_FULL", 1.0)
    assert caught.value.metadata == {"store": "code", "kept_bytes": "30", "limit_bytes": "50"}
    with pytest.raises(ExhaustedError):
        store.hold(A, [function("c", 10), function("d", 11)])
    assert (store.usage.of(A), is_kept(store, A, "c")) == (40, True), "c came, and is not held"
    store.put(function("b", 21), B)
    store.put(function("e", 20), A)
    assert [is_kept(store, *name) for name in ((A, "a"), (A, "c"), (A, "e"), (B, "b"))] == [True, False, True, True]


def test_a_tenant_has_its_own_code_only() -> None:
    store = CodeStore()
    mine = store.put(function("f"), A)
    assert not is_kept(store, B, "f")
    assert store.get("f", Reach(B, is_any=True)) is mine
    assert store.put(function("f"), B) is mine, "equal code is one object"
    assert (store.usage.of(A), store.usage.of(B), store.usage.total) == (10, 10, 20)


def test_code_that_a_lease_refers_to_is_found_though_it_is_evicted() -> None:
    store, referred = CodeStore(Bound(10)), function("a")
    store.put(referred, A)
    store.put(function("b"), A)
    assert not is_kept(store, A, "a")
    assert store.find("a") is store.get("a", EVERYTHING) is referred
    del referred
    gc.collect()
    assert store.find("a") is None


def test_a_worker_forgets_the_functions_called_longest_ago_when_it_has_too_much() -> None:
    sent = SentCode(limit_bytes=20)
    for digest in "ab":
        sent.add(function(digest))
        assert sent.take_excess() == []
    assert sent.use("a")
    sent.add(function("c"))
    assert sent.take_excess() == ["b"]
    assert not sent.use("b")


def test_a_worker_forgets_a_bundle_with_the_last_of_its_functions() -> None:
    sent, bundle = SentCode(limit_bytes=25), Bundle("bundle", None, 10)
    sent.add(function("a", 5, bundle))
    sent.add(function("b", 5, bundle))
    sent.discard("a")
    sent.add(function("a", 5, bundle))
    assert (sent.take_excess(), "bundle" in sent) == ([], True)
    sent.add(function("c", 10))
    assert (sent.take_excess(), "bundle" in sent) == (["b"], True)
    sent.add(function("d", 10))
    assert sent.take_excess() == ["a", "bundle"]
    assert "bundle" not in sent
    sent.add(function("e", 5, bundle))
    assert sent.take_excess() == ["c"], "the bundle counts again"


def test_a_function_that_is_too_large_alone_is_kept_until_the_next() -> None:
    sent = SentCode(limit_bytes=20)
    sent.add(function("large", 100))
    assert sent.take_excess() == []
    sent.add(function("next", 1))
    assert sent.take_excess() == ["large"]
    sent.discard("next")
    assert "next" not in sent
