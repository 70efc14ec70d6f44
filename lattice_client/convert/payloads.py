"""Owns the translation between Python values and payloads.

Rule: JSON when it gives the value back exactly, so that any language can read it; cloudpickle otherwise.
"""

import io
import json
import math
import pickle
import struct
import sys
from collections.abc import Sequence
from typing import Any

from lattice.v1 import payload_pb2, resources_pb2

from lattice_client.code import pickler

JSON = "application/json"
BYTES = "application/octet-stream"
CLOUDPICKLE = "application/vnd.lattice.cloudpickle"
PICKLE5 = "application/vnd.lattice.pickle5"
# Laid out as PICKLE5; the persistent ids of the pickle are positions in the list of values that travels beside it.
WITH_OUTPUTS = "application/vnd.lattice.pickle-with-outputs"
MAGIC = b"LTP5"
ALIGN = 64
# What cloudpickle names wherever it holds code itself, and not only where that is imported from.
BY_VALUE = b"cloudpickle.cloudpickle"
# Every server takes values this short inline; for longer ones it is asked for its limit.
ALWAYS_INLINE_BYTES = 4096
# Python refuses to print and to read integers of over 4300 digits; these have fewer or as many.
MAX_JSON_INT_BITS = 14_284
MAX_JSON_LEVELS = 100


def among_json(value: Any, *kinds: type) -> list[Any] | None:
    """Return the parts of `value` that are of one of `kinds`, if JSON gives all the rest of it back exactly; else None.

    JSON has no references: a container that stands in two places, or within itself, would come back as several. Python
    reads and writes it by recursion, so that it is only for what is not nested too deep.
    """
    found: list[Any] = []
    seen: set[int] = set()
    level = [value]
    for _ in range(MAX_JSON_LEVELS):
        inner: list[Any] = []
        for item in level:
            kind = type(item)
            if kind is list or kind is dict:
                if id(item) in seen:
                    return None
                seen.add(id(item))
                if kind is list:
                    inner += item
                elif all(type(key) is str and _is_unicode(key) for key in item):
                    inner += item.values()
                else:
                    return None
            elif kind in kinds:
                found.append(item)
            elif not _is_scalar(item, kind):
                return None
        if not inner:
            return found
        level = inner
    return None


def _is_scalar(value: Any, kind: type) -> bool:
    if kind is str:
        return _is_unicode(value)
    if kind is int:
        return bool(value.bit_length() <= MAX_JSON_INT_BITS)
    if kind is float:
        return math.isfinite(value)
    return value is None or kind is bool


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def is_json(value: Any) -> bool:
    """Whether JSON gives `value` back exactly."""
    return among_json(value) is not None


def to_json(value: Any) -> bytes:
    """Return the JSON of a value that `is_json`."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, check_circular=False).encode()


def encode(value: Any) -> tuple[str, bytes]:
    """Return a value's media type and its encoding. Raises what pickling raises."""
    if is_json(value):
        return JSON, to_json(value)
    if type(value) is bytes:
        return BYTES, value
    buffers: list[pickle.PickleBuffer] = []
    stream = pickler.dumps(value, buffers.append)
    return (PICKLE5, _layout(stream, buffers)) if buffers else (CLOUDPICKLE, stream)


def encode_around(value: Any, kinds: Sequence[type]) -> tuple[bytes, list[Any]]:
    """Return the encoding, as `WITH_OUTPUTS`, of a value without the parts that are of `kinds`, and those parts.

    A part that stands in several places is returned once. Raises what pickling raises.
    """
    stream = io.BytesIO()
    around = _Around(stream, kinds)
    around.dump(value)
    return _layout(stream.getbuffer(), around.buffers), [item for _, item in around.found.values()]


class _Around(pickler.Pickler):
    def __init__(self, stream: io.BytesIO, kinds: Sequence[type]) -> None:
        self.buffers: list[pickle.PickleBuffer] = []
        super().__init__(stream, self.buffers.append)
        # By identity: each with its position, and kept so that no other one comes to have that identity.
        self.found: dict[int, tuple[int, Any]] = {}
        self._kinds = kinds

    def persistent_id(self, item: Any) -> int | None:
        if type(item) not in self._kinds:
            return None
        return self.found.setdefault(id(item), (len(self.found), item))[0]


def _layout(stream: Any, buffers: list[pickle.PickleBuffer]) -> bytes:
    parts = [memoryview(stream), *(buffer.raw() for buffer in buffers)]
    out: list[Any] = [MAGIC + struct.pack(f"<IQ{len(parts)}Q", 1, len(parts), *(part.nbytes for part in parts))]
    offset = len(out[0])
    for part in parts:
        padding = -offset % ALIGN
        out += [b"\0" * padding, part]
        offset += padding + part.nbytes
    return b"".join(out)


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


def runtime_of(pickled: bytes) -> resources_pb2.Runtime | None:
    """Return what a pickled function needs to run it: this version of Python if it holds bytecode, else None."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return resources_pb2.Runtime(language="python", version=version) if BY_VALUE in pickled else None
