"""Data frames as Arrow streams: exact, or not encoded; and one typed error for all other bytes."""

import contextlib
import datetime as dt
import io
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lattice_client.convert
import lattice_worker.runner.encoding
from lattice_worker.runner.encoding import dataframes, values
from lattice_worker.runner.encoding.arrays import DataError
from lattice_worker.runner.encoding.dataframes import decode_frame, encode_frame

pd = pytest.importorskip("pandas")
pa = pytest.importorskip("pyarrow")

COLUMNS: list[Any] = [
    [1, 2, 3],
    [1.5, float("nan"), -0.0],
    ["a", None, "ü"],
    [True, False, True],
    [dt.date(2026, 1, 1)] * 3,
    [Decimal("1.50")] * 3,
    pd.Categorical(["x", "y", "x"]),
    pd.array([1, None, 3], dtype="Int64"),
    pd.date_range("2026-01-01", periods=3, tz="Europe/Rome"),
    pd.to_timedelta([1, 2, 3], unit="s"),
    np.array([1, 2, 3], "f4"),
]
INDEXES: list[Any] = [
    None,
    ["x", "y", "z"],
    pd.MultiIndex.from_tuples([(1, "a"), (1, "b"), (2, "a")], names=["n", None]),
]


@pytest.mark.parametrize("column", COLUMNS, ids=str)
@pytest.mark.parametrize("index", INDEXES, ids=["numbers", "names", "levels"])
def test_data_frame_comes_back_exactly(column: Any, index: Any) -> None:
    frame = pd.DataFrame({"a": column, "b": [1, 2, 3]}, index=None)
    if index is not None:
        frame.index = index if isinstance(index, pd.MultiIndex) else pd.Index(index)
    media_type, parts = values.encode_value(frame, as_data=True)
    assert media_type == dataframes.ARROW
    found = values.decode_value(media_type, b"".join(parts))
    pd.testing.assert_frame_equal(found, frame, check_exact=True, check_freq=False)


def test_table_comes_back_as_a_table() -> None:
    table = pa.table({"a": [[1], None], "b": [{"x": 1}, {"x": 2}]}, metadata={"k": "v"})
    parts = encode_frame(table)
    assert parts is not None
    assert decode_frame(b"".join(parts)).equals(table, check_metadata=True)


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"a": [1, "x"]}),
        pd.DataFrame({"a": [object()]}),
        pd.DataFrame({"a": [(1, 2)]}),
        pd.DataFrame({"a": [True, 1]}, dtype=object),
        pd.DataFrame({"a": [None, None]}),
        pd.DataFrame({1: [1], "a": [2]}),
        pd.DataFrame(index=[1, 2]),
    ],
    ids=range(7),
)
def test_data_frame_is_pickled_when_arrow_would_change_it(frame: Any) -> None:
    parts = encode_frame(frame)
    if parts is not None:
        pd.testing.assert_frame_equal(decode_frame(b"".join(parts)), frame, check_exact=True)
    assert parts is None or frame.columns.dtype == object


def stream(table: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue()


@pytest.mark.parametrize(
    "make",
    [
        lambda: stream(pa.table({"a": np.zeros(100_000)}), compression="zstd"),
        lambda: stream(pa.table({"a": np.zeros(100_000)}), compression="lz4"),
        lambda: stream(pa.table({"a": pa.array(["x"] * 10_000).dictionary_encode()}), compression="zstd"),
        lambda: stream(pa.table({"a": pa.nulls(10**9)})),
        lambda: stream(pa.table({"a": pa.array([], pa.list_(pa.int8(), 0))})),
        lambda: stream(pa.table({"a": pa.array([], pa.run_end_encoded(pa.int32(), pa.int8()))})),
        lambda: stream(pa.table({"a": pa.array([1])}))[:-20],
    ],
    ids=["zstd", "lz4", "dictionary", "nulls", "empty lists", "runs", "cut"],
)
def test_stream_is_refused_when_few_bytes_stand_for_many(make: Callable[[], bytes]) -> None:
    with pytest.raises(DataError):
        decode_frame(make())


VALID = stream(pa.table({"a": pa.array(["x", None, "y"]).dictionary_encode(), "b": [[1], [], [2, 3]]}))


@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_stream_is_a_value_or_an_error(changes: list[tuple[int, int]]) -> None:
    data = bytearray(VALID)
    for position, byte in changes:
        data[position] = byte
    with contextlib.suppress(DataError):
        decode_frame(bytes(data))


@given(st.binary(max_size=300))
def test_any_bytes_are_a_value_or_an_error(data: bytes) -> None:
    for form in (data, b"\xff\xff\xff\xff" + data):
        with contextlib.suppress(DataError):
            decode_frame(form)


def test_client_and_runner_have_the_same_data_frames() -> None:
    of_client = Path(lattice_client.convert.__file__).with_name("dataframes.py").read_text()
    of_runner = Path(lattice_worker.runner.encoding.__file__).with_name("dataframes.py").read_text()
    assert of_client == of_runner.replace("lattice_worker.runner.encoding", "lattice_client.convert")
