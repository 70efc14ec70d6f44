"""Arrays as .npy and data frames as Arrow IPC streams, which are decoded without running code.

NumPy, pandas and pyarrow are imported only for values of theirs. The client and the runner have the same file.

Rule: for any bytes a decoder returns a value or raises DataError, and allocates no more than a small multiple of their
size. An encoder returns None for a value that would not be decoded exactly.
"""

import io
import math
import sys
from typing import Any

NPY = "application/vnd.lattice.npy"
# Booleans, numbers, times, and texts and bytes of a fixed length. All others hold references, or are of other packages.
KINDS = frozenset("biufcmMSUV")
MAX_HEADER_BYTES = 10_000  # Of the Python literal in a header.
_PREFIX_BYTES = MAX_HEADER_BYTES + 64


class DataError(ValueError):
    """Bytes that are not what their media type says."""


def encode_array(value: Any) -> list[Any] | None:
    """Return an array as .npy, in parts; None for a value that is no array, or one that .npy cannot represent."""
    numpy = sys.modules.get("numpy")
    if numpy is None or type(value) is not numpy.ndarray:
        return None
    if value.dtype.kind not in KINDS or value.dtype.hasobject or not value.dtype.itemsize or value.dtype.metadata:
        return None
    is_fortran = value.flags.f_contiguous and not value.flags.c_contiguous
    try:
        head = _head(value, is_fortran)
        dtype, shape, _, _ = _read_head(head)
    except ValueError:  # The header is too large, or has names of fields that .npy cannot write.
        return None
    if dtype != value.dtype or shape != value.shape:
        return None
    flat = numpy.ascontiguousarray(value.T if is_fortran else value).reshape(-1)
    return [head, memoryview(flat.view(numpy.uint8)) if flat.size else b""]


def encode_scalar(value: Any) -> bytes | None:
    """Return a scalar of NumPy as the .npy of an array without dimensions; None for other values."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, numpy.generic):
        return None
    array = numpy.asarray(value)
    if array.dtype.type is not type(value):
        return None
    parts = encode_array(array)
    return None if parts is None else b"".join(parts)


def decode_array(data: Any) -> Any:
    """Return the array in .npy; it is on the memory of `data` when that can be written to. Raises DataError."""
    try:
        return _array(data)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"an array cannot be decoded: {type(error).__name__}: {error}") from error


def decode_scalar(data: bytes) -> Any:
    """Return the scalar in .npy. Raises DataError."""
    array = decode_array(data)
    if array.shape:
        raise DataError("a scalar has dimensions")
    return array[()]


def _array(data: Any) -> Any:
    import numpy

    # On bytes an array could only be read.
    data = bytearray(data) if isinstance(data, bytes) else data
    dtype, shape, is_fortran, offset = _read_head(bytes(memoryview(data)[:_PREFIX_BYTES]))
    if dtype.kind not in KINDS or dtype.hasobject or not dtype.itemsize or dtype.subdtype is not None:
        raise DataError(f"arrays of {dtype} are not decoded")
    size = math.prod(shape) * dtype.itemsize
    if any(length < 0 for length in shape) or len(data) - offset != size:
        raise DataError(f"an array of shape {shape} and {dtype} has {len(data) - offset} bytes")
    flat = numpy.frombuffer(data, dtype, offset=offset) if size else numpy.empty(0, dtype)
    return flat.reshape(shape, order="F" if is_fortran else "C")


def _head(value: Any, is_fortran: bool) -> bytes:
    from numpy.lib import format as npy

    described = {"descr": npy.dtype_to_descr(value.dtype), "fortran_order": is_fortran, "shape": value.shape}
    stream = io.BytesIO()
    npy.write_array_header_1_0(stream, described)
    return stream.getvalue()


def _read_head(head: bytes) -> tuple[Any, tuple[int, ...], bool, int]:
    """Return the type, the shape, the order and the offset of the data. Raises ValueError and others."""
    from numpy.lib import format as npy

    stream = io.BytesIO(head)
    if (version := npy.read_magic(stream)) != (1, 0):
        raise DataError(f"version {version} of .npy is not decoded")
    shape, is_fortran, dtype = npy.read_array_header_1_0(stream, max_header_size=MAX_HEADER_BYTES)
    return dtype, shape, is_fortran, stream.tell()
