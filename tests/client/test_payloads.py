"""The encoding of values: JSON when it represents the value exactly, and pickle otherwise."""

import functools
import json
import math
import statistics
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lattice.v1 import resources_pb2

from lattice_client import entrypoint, task
from lattice_client.code.function import pack, runtime_of
from lattice_client.convert import payloads
from lattice_worker.runner.encoding import values

plain = st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats() | st.text()
jsonable = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
anything = st.recursive(
    plain | st.binary() | st.complex_numbers(allow_nan=False) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
    ),
    max_leaves=20,
)
arrays = st.builds(
    lambda kind, shape, order: np.arange(math.prod(shape)).astype(kind).reshape(shape, order=order),
    st.sampled_from(["u1", "i4", "f8", "c16", "?"]),
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from(["C", "F"]),
)


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same to the type, the sign of a zero and the order of a dict; NaN is NaN."""
    if type(one) is not type(other):
        return False
    match one:
        case float():
            return (math.isnan(one) and math.isnan(other)) or (
                one == other and math.copysign(1, one) == math.copysign(1, other)
            )
        case list() | tuple():
            return len(one) == len(other) and all(map(same, one, other))
        case dict():
            return same(list(one), list(other)) and same(list(one.values()), list(other.values()))
        case np.ndarray():
            return bool(one.dtype == other.dtype and one.shape == other.shape and (one == other).all())
    return bool(one == other)


def through(value: Any) -> Any:
    media_type, data = payloads.encode(value)
    payload = payloads.inline(media_type, data)
    sent = payload.json.encode() if payload.WhichOneof("content") == "json" else payload.data
    return payloads.decode(payload.media_type, sent, may_unpickle=True)


@given(jsonable)
def test_value_is_json_when_json_represents_it_exactly(value: Any) -> None:
    media_type, data = payloads.encode(value)
    assert media_type == payloads.JSON
    assert same(json.loads(data), value)
    assert same(through(value), value)


@given(anything)
def test_decoded_value_equals_the_encoded_one(value: Any) -> None:
    assert same(through(value), value)


@given(anything)
def test_client_and_runner_have_the_same_pickler(value: Any) -> None:
    media_type, data = payloads.encode(value)
    assert same(values.decode_value(media_type, data), value)
    media_type, parts = values.encode_value(value)
    assert same(payloads.decode(media_type, b"".join(parts), may_unpickle=True), value)


@given(st.lists(arrays, min_size=1, max_size=3))
def test_arrays_travel_beside_the_pickle(value: list[Any]) -> None:
    assert same(through(value), value)
    media_type, parts = values.encode_value(value)
    assert same(
        payloads.decode(media_type, bytearray(b"".join(bytes(part) for part in parts)), may_unpickle=True), value
    )


@pytest.mark.parametrize(
    ("value", "media_type"),
    [
        (b"", payloads.BYTES),
        (b"\0\xff", payloads.BYTES),
        (bytearray(b"x"), payloads.CLOUDPICKLE),
        (math.nan, payloads.CLOUDPICKLE),
        (-0.0, payloads.JSON),
        ((1, 2), payloads.CLOUDPICKLE),
        ({1: 2}, payloads.CLOUDPICKLE),
        (2**64 + 1, payloads.JSON),
        ("\ud800", payloads.CLOUDPICKLE),
        ([True, 1, 1.0], payloads.JSON),
    ],
)
def test_the_encoding_fits_the_value(value: Any, media_type: str) -> None:
    assert payloads.encode(value)[0] == media_type
    assert same(through(value), value)


def _cycle() -> Any:
    found: dict[str, Any] = {"k": [1]}
    found["self"] = [found]
    return found


def _shared() -> Any:
    shared = [1]
    return {"a": shared, "b": {"c": shared}}


def _nested(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("make", "media_type", "holds"),
    [
        (_cycle, payloads.CLOUDPICKLE, lambda x: x["self"][0] is x and x["k"] == [1]),
        (_shared, payloads.CLOUDPICKLE, lambda x: x["a"] is x["b"]["c"] and x["a"] == [1]),
        (lambda: [[], []], payloads.JSON, lambda x: x == [[], []] and x[0] is not x[1]),
        (lambda: ("a", "a"), payloads.CLOUDPICKLE, lambda x: x == ("a", "a")),
        (lambda: ["text"] * 2, payloads.JSON, lambda x: x == ["text", "text"]),
        (lambda: _nested(payloads.MAX_JSON_LEVELS - 1), payloads.JSON, lambda x: x == _nested(99)),
        (lambda: _nested(payloads.MAX_JSON_LEVELS), payloads.CLOUDPICKLE, lambda x: x == _nested(100)),
        (lambda: {"b": 1, "a": 2}, payloads.JSON, lambda x: list(x) == ["b", "a"]),
    ],
)
def test_both_codecs_preserve_values_that_are_not_json(make: Any, media_type: str, holds: Any) -> None:
    value = make()
    assert payloads.encode(value)[0] == media_type
    assert holds(values.decode_value(*payloads.encode(value)))
    found, parts = values.encode_value(value)
    assert found == media_type
    assert holds(payloads.decode(found, b"".join(parts), may_unpickle=True))


def test_a_value_nested_too_deep_to_travel_is_an_error_of_the_encoding() -> None:
    for encode in (payloads.encode, values.encode_value):
        with pytest.raises(Exception, match="deep"):
            encode(_nested(100_000))


def test_a_key_that_is_not_unicode_travels() -> None:
    value = [{"\ud800": 1}]
    assert through(value) == value
    assert values.encode_value(value)[0] == payloads.CLOUDPICKLE


def test_a_huge_integer_travels() -> None:
    # Not parameters: Python, and so pytest, refuses to print them.
    for value in (10**5000, -(10**4300), 10**4300 - 1, 1 - 10**4300, 10**4299):
        assert same(through(value), value)
        media_type, parts = values.encode_value(value)
        assert same(payloads.decode(media_type, b"".join(parts), may_unpickle=True), value)


def test_an_array_can_be_written_to_however_small_it_is() -> None:
    array = through(np.zeros(3))
    array += 1
    assert array.sum() == 3


def test_an_unknown_encoding_comes_back_as_bytes() -> None:
    assert payloads.decode("image/png", b"\x89PNG", may_unpickle=True) == b"\x89PNG"


def test_code_needs_its_own_version_of_python_and_a_name_none() -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    here, anything = resources_pb2.Runtime(language="python", version=version), resources_pb2.Runtime()
    assert runtime_of(pack(statistics.mean)[0]) is None
    for code in (lambda: 1, functools.partial(statistics.mean, key=lambda: 1), type("Local", (), {})):
        assert runtime_of(pack(code)[0]) == here
    assert task(lambda: 1).pack()[0].runtime == here
    assert task(statistics.mean).pack()[0].runtime == entrypoint("statistics:mean").pack()[0].runtime == anything
