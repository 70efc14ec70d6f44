"""The codec of values: how one travels between processes.

Rule: JSON when it gives the value back exactly, so that any language can read it; cloudpickle otherwise.
"""

import json
import math
import pickle
import struct
from typing import Any

from lattice_worker.runner import pickler

JSON = "application/json"
BYTES = "application/octet-stream"
CLOUDPICKLE = "application/vnd.lattice.cloudpickle"
PICKLE5 = "application/vnd.lattice.pickle5"
MAGIC = b"LTP5"
ALIGN = 64
# Python refuses to print and to read integers of over 4300 digits; these have fewer or as many.
MAX_JSON_INT_BITS = 14_284


class PayloadError(Exception):
    """A value or a function cannot be decoded, encoded or found."""


def is_json(value: Any) -> bool:
    """Whether JSON gives `value` back exactly."""
    kind = type(value)
    if kind is str:
        return value.isascii() or not any("\ud800" <= c <= "\udfff" for c in value)
    if value is None or kind is bool:
        return True
    if kind is int:
        return bool(value.bit_length() <= MAX_JSON_INT_BITS)
    if kind is float:
        return math.isfinite(value)
    if kind is list:
        return all(map(is_json, value))
    return kind is dict and all(type(key) is str and is_json(key) and is_json(item) for key, item in value.items())


def encode_value(value: Any) -> tuple[str, list[Any]]:
    """Return a value's media type and its encoding, in parts."""
    if is_json(value):
        return JSON, [json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()]
    if type(value) is bytes:
        return BYTES, [value]
    buffers: list[pickle.PickleBuffer] = []
    stream = pickler.dumps(value, buffers.append)
    if not buffers:
        return CLOUDPICKLE, [stream]
    parts = [memoryview(stream), *(buffer.raw() for buffer in buffers)]
    out: list[Any] = [MAGIC + struct.pack(f"<IQ{len(parts)}Q", 1, len(parts), *(part.nbytes for part in parts))]
    offset = len(out[0])
    for part in parts:
        padding = -offset % ALIGN
        out += [b"\0" * padding, part]
        offset += padding + part.nbytes
    return PICKLE5, out


def decode_value(media_type: str, data: Any) -> Any:
    """Return the value encoded in `data`, bytes or a memory map."""
    if media_type == JSON:
        return json.loads(bytes(data))
    if media_type == BYTES:
        return bytes(data)
    if media_type == CLOUDPICKLE:
        return pickle.loads(data)
    if media_type != PICKLE5:
        raise PayloadError(f"a value is encoded as {media_type!r}, which Python tasks cannot read")
    # Over bytes, arrays could only be read.
    view = memoryview(bytearray(data) if isinstance(data, bytes) else data)
    (count,) = struct.unpack_from("<Q", view, 8)
    offset = 16 + 8 * count
    parts = []
    for size in struct.unpack_from(f"<{count}Q", view, 16):
        offset += -offset % ALIGN
        parts.append(view[offset : offset + size])
        offset += size
    return pickle.loads(parts[0], buffers=parts[1:])
