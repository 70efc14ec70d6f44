"""Code by its digest: how long it is found here, and how much of it a worker keeps."""

import gc

import pytest

from lattice_server.core.errors import PreconditionError
from lattice_server.core.model import Function
from lattice_server.engine.code_store import CodeStore, SentCode


def function(digest: str) -> Function:
    return Function(digest, False, None)


def test_the_code_used_longest_ago_goes_first_when_there_is_too_much() -> None:
    store = CodeStore(limit_bytes=20)
    for digest in "ab":
        store.put(digest, function(digest), 10)
    store.get("a")
    store.put("c", function("c"), 10)
    gc.collect()
    assert (store.find("a") is not None, store.find("b"), store.find("c") is not None) == (True, None, True)
    with pytest.raises(PreconditionError) as caught:
        store.get("b")
    assert caught.value.reason == "FUNCTION_MISSING"


def test_code_is_found_while_something_refers_to_it() -> None:
    store, held = CodeStore(limit_bytes=10), function("a")
    store.put("a", held, 10)
    store.put("b", function("b"), 10)
    assert store.get("a") is store.find("a") is held
    del held
    gc.collect()
    assert store.find("a") is None


def test_a_worker_forgets_the_functions_called_longest_ago_when_it_has_too_much() -> None:
    sent = SentCode(limit_bytes=20)
    sent.add_bundle("bundle")
    for digest in "ab":
        sent.add_function(digest, 10)
        assert sent.take_excess() == []
    assert sent.use("a")
    sent.add_function("c", 10)
    assert sent.take_excess() == ["b"]
    assert not sent.use("b")
    assert "bundle" in sent


def test_a_function_that_is_too_large_alone_is_kept_until_the_next() -> None:
    sent = SentCode(limit_bytes=20)
    sent.add_function("large", 100)
    assert sent.take_excess() == []
    sent.add_function("next", 1)
    assert sent.take_excess() == ["large"]
    sent.discard("next")
    assert "next" not in sent
