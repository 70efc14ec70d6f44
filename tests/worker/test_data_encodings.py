"""Encodings that decode without running code: exact round trips, and one typed error for all other bytes."""

import contextlib
import datetime as dt
import io
import json
import math
import pickle
import uuid
from collections import OrderedDict
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lattice_client.convert
import lattice_worker.runner.encoding
from lattice_client.convert import tagged as client_tagged
from lattice_worker.runner.encoding import arrays, tagged, values
from lattice_worker.runner.encoding.arrays import DataError

ZONES = st.none() | st.just(dt.UTC) | st.just(dt.timezone(dt.timedelta(minutes=-90))) | st.just(ZoneInfo("Europe/Rome"))
FOLDS = st.integers(0, 1)
moments = st.builds(lambda moment, fold: moment.replace(fold=fold), st.datetimes(timezones=ZONES), FOLDS)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**400), 2**400)
    | st.floats()
    | st.text(st.characters())
    | st.text(st.characters(categories=["Cs"]))
    | st.binary()
    | st.complex_numbers()
    | st.decimals()
    | st.uuids()
    | moments
    | st.dates()
    | st.times(timezones=st.none() | st.just(dt.UTC))
    | st.timedeltas()
)
numeric = st.sampled_from([1, 1.0, True, 0, -0.0, False, 2**70, -(2**53), 2**53])
keys = st.recursive(
    (scalars | numeric).filter(lambda value: repr(value).lower().find("nan") < 0),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
anything = st.recursive(
    scalars | numeric,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.sets(keys, max_size=3)
        | st.frozensets(keys, max_size=3)
        | st.dictionaries(keys | st.text("$ab", max_size=3), inner, max_size=4)
        | inner.map(lambda item: [item, [item], (item,)])
    ),
    max_leaves=15,
)
dtypes = st.sampled_from(["u1", "<i4", ">f8", "c16", "?", "M8[ns]", "m8[D]", "U3", "S2", "V5", "f2"])
nd_arrays = st.builds(
    lambda kind, shape, order: (
        np.frombuffer(np.random.default_rng(1).bytes(math.prod(shape) * np.dtype(kind).itemsize), kind)
        if kind not in {"?", "U3"}
        else np.ones(math.prod(shape), kind)
    ).reshape(shape, order=order),
    dtypes,
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(["C", "F"]),
)


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same to types, signs of zeros, folds and zones; NaN is NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, set | frozenset):
        return sorted(map(shown, one)) == sorted(map(shown, other))
    return shown(one) == shown(other)


def shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value))})"
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(shown, value)))}}}"
    return repr(value)


def through(value: Any) -> Any:
    data = tagged.encode(value)
    assert data is not None
    return tagged.decode(data)


@given(anything)
def test_tagged_json_gives_values_back_exactly(value: Any) -> None:
    assert same(through(value), value)


@given(anything)
def test_client_reads_the_tagged_json_of_a_runner(value: Any) -> None:
    assert same(client_tagged.decode(tagged.encode(value) or b""), value)


@given(nd_arrays)
def test_npy_gives_arrays_back_exactly(value: Any) -> None:
    parts = arrays.encode_array(value)
    assert parts is not None
    found = arrays.decode_array(b"".join(parts))
    assert (found.dtype, found.shape, found.tobytes()) == (value.dtype, value.shape, value.tobytes())
    assert found.flags.writeable
    nested = through({"deep": [value]})["deep"][0]
    assert (nested.dtype, nested.shape, nested.tobytes()) == (value.dtype, value.shape, value.tobytes())


@pytest.mark.parametrize(
    "scalar", [np.float32(1.5), np.int64(-3), np.bool_(True), np.datetime64("2026-01-01"), np.str_("a")]
)
def test_scalars_of_numpy_keep_their_type(scalar: Any) -> None:
    found = through([scalar])[0]
    assert type(found) is type(scalar)
    assert found == scalar


def test_shared_and_nested_containers_stay_shared() -> None:
    inner: list[Any] = [1]
    array = np.arange(3)
    found = through({"a": inner, "b": (inner, {"c": inner}), "x": [array, array], "y": bytearray(b"1")})
    found["a"].append(2)
    assert found["b"][0] == found["b"][1]["c"] == [1, 2]
    assert found["x"][0] is found["x"][1]
    doubled: Any = [1]
    for _ in range(60):
        doubled = [doubled, doubled]
    data = tagged.encode(doubled)
    assert data is not None
    assert len(data) < 4000


def test_values_that_data_cannot_represent_are_pickled() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    named_zone = dt.datetime(2026, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1), "MINE"))
    for value in (
        cycle,
        deep,
        named_zone,
        OrderedDict(a=1),
        object(),
        np.array([None]),
        np.zeros(2, np.dtype([])),
    ):
        assert tagged.encode([value]) is None
    assert values.encode_value(OrderedDict(a=1), as_data=True)[0] == values.CLOUDPICKLE
    assert values.encode_value(np.array([None]), as_data=True)[0] == values.CLOUDPICKLE


def test_data_is_used_only_where_it_is_asked_for() -> None:
    wanted = [([1], values.JSON), (b"1", values.BYTES), ((1, 2), tagged.MEDIA_TYPE), (np.arange(2), arrays.NPY)]
    for value, media_type in wanted:
        found, parts = values.encode_value(value, as_data=True)
        assert found == media_type
        assert same(values.decode_value(found, b"".join(parts)), value)
    assert values.encode_value((1, 2))[0] == values.CLOUDPICKLE


@given(st.binary(max_size=200))
def test_decoders_return_or_raise_one_error_for_any_bytes(data: bytes) -> None:
    for decode in (tagged.decode, arrays.decode_array):
        for form in (data, b"\x93NUMPY\x01\x00" + data):
            with contextlib.suppress(DataError):
                decode(form)


tags = st.sampled_from(
    [
        *(
            f"${name}"
            for name in ["shared", "same", "dict", "tuple", "set", "frozenset", "str", "int", "float", "bytes"]
        ),
        *tagged._READERS,
        "$",
        "$x",
        "a",
    ]
)
nodes = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.sampled_from(["0x1f", "nan", "-inf", "1E+3", "2026-01-01", "2026-01-01T00:00:00", "AAAA", "UTC", "/etc/x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(tags, inner, max_size=2),
    max_leaves=12,
)


@given(nodes)
def test_tagged_json_of_any_form_is_a_value_or_an_error(node: Any) -> None:
    with contextlib.suppress(DataError):
        tagged.decode(json.dumps(node).encode())


@given(
    st.dictionaries(
        st.sampled_from(["descr", "fortran_order", "shape", "x"]),
        nodes | st.sampled_from(["<i4", "|O", "V0"]) | st.lists(st.integers(-3, 2**70), max_size=3).map(tuple),
        max_size=4,
    ),
    st.binary(max_size=16),
)
def test_npy_header_of_any_form_is_an_array_or_an_error(header: dict[str, Any], data: bytes) -> None:
    literal = repr(header).encode()
    head = b"\x93NUMPY\x01\x00" + len(literal).to_bytes(2, "little") + literal
    with contextlib.suppress(DataError):
        arrays.decode_array(head + data)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"$tuple":[' * 200 + "]}" * 200,
        '{"$x":1}',
        '{"$tuple":[],"a":1}',
        '{"a":1,"a":2}',
        '{"$same":0}',
        '[{"$shared":[0,[]]},{"$shared":[0,[]]}]',
        '{"$shared":[0,[{"$same":0}]]}',
        '{"$set":[{"$shared":[0,{"$tuple":[]}]}]}',
        '{"$set":[1,1]}',
        '{"$set":[[1]]}',
        '{"$dict":[[1,2],[true,3]]}',
        '{"$bytes":"A"}',
        '{"$int":"12"}',
        '{"$datetime":["2026-01-01T00:00:00",0,"../../etc/passwd"]}',
        '{"$datetime":["2026-01-01T00:00:00",0,"No/Such"]}',
        '{"$datetime":"20260101"}',
        '{"$uuid":"{12345678123456781234567812345678}"}',
        '{"$decimal":" 1"}',
        '{"$str":[1114112]}',
        '{"$array":""}',
        "NaN",
        "1e999",
        "\ud800",
    ],
)
def test_tagged_json_is_refused_when_it_is_malformed(text: str) -> None:
    with pytest.raises(DataError):
        tagged.decode(text.encode(errors="surrogatepass"))


def test_arrays_of_objects_are_refused() -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(DataError, match="object"):
        arrays.decode_array(stream.getvalue())


def test_decoder_of_data_never_unpickles(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    data = tagged.encode({"a": (np.arange(3), uuid.uuid4(), Decimal(1))})
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    assert tagged.decode(data)["a"][2] == 1


@pytest.mark.parametrize("name", ["arrays.py", "tagged.py"])
def test_client_and_runner_have_the_same_encodings(name: str) -> None:
    of_client = Path(lattice_client.convert.__file__).with_name(name).read_text()
    of_runner = Path(lattice_worker.runner.encoding.__file__).with_name(name).read_text()
    assert of_client == of_runner.replace("lattice_worker.runner.encoding", "lattice_client.convert")
