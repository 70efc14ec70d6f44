"""The layout of pickles with buffers, read as the comment of `Payload` tells it and by no code of the packages."""

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lattice_client.convert import payloads
from lattice_worker.runner.encoding.values import decode_value, encode_value

PICKLE5 = "application/vnd.lattice.pickle5"


def parts_of(data: bytes) -> list[bytes]:
    """Return the parts of a value in this layout."""
    numbers = [int.from_bytes(data[start : start + 8], "little") for start in range(8, len(data) - 7, 8)]
    assert data[:4] == b"LTP5"
    assert int.from_bytes(data[4:8], "little") == 1
    count, *lengths = numbers[: numbers[0] + 1]
    end, parts = 16 + 8 * count, []
    for length in lengths:
        start = (end + 63) // 64 * 64
        assert not any(data[end:start])
        end = start + length
        parts.append(data[start:end])
    assert end == len(data)
    return parts


def encoded_by_worker(value: Any) -> tuple[str, bytes]:
    media_type, parts = encode_value(value)
    return media_type, b"".join(bytes(part) for part in parts)


@pytest.mark.parametrize("encode", [payloads.encode, encoded_by_worker], ids=["client", "worker"])
@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=4))
def test_value_is_a_pickle_and_its_buffers_when_it_holds_arrays(
    encode: Callable[[Any], tuple[str, bytes]], sizes: list[int]
) -> None:
    value = [np.arange(size, dtype=np.uint8) for size in sizes]
    media_type, data = encode(value)
    assert media_type == PICKLE5
    stream, *buffers = parts_of(data)
    assert [len(buffer) for buffer in buffers] == sizes
    for found in (
        pickle.loads(stream, buffers=buffers),
        payloads.decode(media_type, data, may_unpickle=True),
        decode_value(PICKLE5, data),
    ):
        assert [list(array) for array in found] == [list(array) for array in value]
