"""Owns the translation between Python values and payloads.

Rule: JSON when it gives the value back exactly, so that any language can read it; cloudpickle otherwise.
"""

import json
import math
import pickle
import struct
import sys
from typing import Any

from lattice.v1 import payload_pb2

from lattice_client import pickler

JSON = "application/json"
BYTES = "application/octet-stream"
CLOUDPICKLE = "application/vnd.lattice.cloudpickle"
PICKLE5 = "application/vnd.lattice.pickle5"
MAGIC = b"LTP5"
ALIGN = 64
# What cloudpickle names wherever it holds code itself, and not only where that is imported from.
BY_VALUE = b"cloudpickle.cloudpickle"
INLINE_LIMIT_BYTES = 256 * 1024
# Python refuses to print and to read integers of over 4300 digits; these have fewer or as many.
MAX_JSON_INT_BITS = 14_284


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


def encode(value: Any) -> tuple[str, bytes]:
    """Return a value's media type and its encoding. Raises what pickling raises."""
    if is_json(value):
        return JSON, json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    if type(value) is bytes:
        return BYTES, value
    buffers: list[pickle.PickleBuffer] = []
    stream = pickler.dumps(value, buffers.append)
    if not buffers:
        return CLOUDPICKLE, stream
    parts = [memoryview(stream), *(buffer.raw() for buffer in buffers)]
    out: list[Any] = [MAGIC + struct.pack(f"<IQ{len(parts)}Q", 1, len(parts), *(part.nbytes for part in parts))]
    offset = len(out[0])
    for part in parts:
        padding = -offset % ALIGN
        out += [b"\0" * padding, part]
        offset += padding + part.nbytes
    return PICKLE5, b"".join(out)


def inline(media_type: str, data: bytes) -> payload_pb2.Payload:
    """Return the payload of an encoding short enough to inline."""
    if media_type == JSON:
        return payload_pb2.Payload(media_type=JSON, json=data.decode())
    return payload_pb2.Payload(media_type=media_type, data=data)


def decode(media_type: str, data: bytes | bytearray) -> Any:
    """Return the value encoded in `data`. Unknown encodings come back as bytes."""
    match media_type or JSON:
        case "application/json":
            return json.loads(data)
        case "application/vnd.lattice.cloudpickle":
            return pickle.loads(data)
        case "application/vnd.lattice.pickle5":
            # Over bytes, arrays could only be read.
            view = memoryview(bytearray(data) if isinstance(data, bytes) else data)
            (count,) = struct.unpack_from("<Q", view, 8)
            offset, parts = 16 + 8 * count, []
            for size in struct.unpack_from(f"<{count}Q", view, 16):
                offset += -offset % ALIGN
                parts.append(view[offset : offset + size])
                offset += size
            return pickle.loads(parts[0], buffers=parts[1:])
        case _:
            return bytes(data)


def runtime_of(pickled: bytes) -> str:
    """Return what a pickled function needs to run it: this version of Python if it holds bytecode, else anything."""
    return f"python {sys.version_info.major}.{sys.version_info.minor}" if BY_VALUE in pickled else ""
