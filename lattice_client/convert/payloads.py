"""Owns the translation between Python values and payloads.

Rule: a value that JSON represents exactly is JSON, which any language can read; any other value is pickled. A pickle is
decoded only for a caller that says that it may be.
"""

import io
import json
import math
import pickle
import struct
from collections.abc import Sequence
from typing import Any

from lattice.v1 import payload_pb2

from lattice_client.code import pickler
from lattice_client.convert import arrays, dataframes, tagged

JSON = "application/json"
BYTES = "application/octet-stream"
CLOUDPICKLE = "application/vnd.lattice.cloudpickle"
PICKLE5 = "application/vnd.lattice.pickle5"
# The layout of PICKLE5; the persistent ids in the pickle are indexes of the list of values that follows it.
WITH_OUTPUTS = "application/vnd.lattice.pickle-with-outputs"
PICKLES = frozenset({CLOUDPICKLE, PICKLE5})  # The encodings whose decoders run code that the bytes choose.
MAGIC = b"LTP5"
ALIGN = 64
# Every server accepts inline values up to this size; for larger ones the client reads the server's limit.
ALWAYS_INLINE_BYTES = 4096
# Python refuses to convert integers of over 4300 digits; an integer of this many bits has at most that many.
MAX_JSON_INT_BITS = 14_284
MAX_JSON_LEVELS = 100


def among_json(value: Any, *kinds: type) -> list[Any] | None:
    """Return the parts of `value` that are of one of `kinds`, if JSON represents the rest exactly; else None.

    JSON has no references: a container that occurs twice, or within itself, would be decoded as several. Python encodes
    and decodes JSON by recursion, so that a value nested over MAX_JSON_LEVELS deep is not JSON.
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
    """Whether JSON represents a value exactly."""
    return among_json(value) is not None


def to_json(value: Any) -> bytes:
    """Return the JSON of a value that `is_json`."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, check_circular=False).encode()


def encode(value: Any) -> tuple[str, bytes]:
    """Return a value's media type and encoding. Raises any exception of pickling."""
    if is_json(value):
        return JSON, to_json(value)
    if type(value) is bytes:
        return BYTES, value
    buffers: list[pickle.PickleBuffer] = []
    stream = pickler.dumps(value, buffers.append)
    return (PICKLE5, _layout(stream, buffers)) if buffers else (CLOUDPICKLE, stream)


def encode_around(value: Any, kinds: Sequence[type]) -> tuple[bytes, list[Any]]:
    """Return a value's encoding as `WITH_OUTPUTS` without the parts of one of `kinds`, and those parts.

    A part that occurs several times is returned once. Raises any exception of pickling.
    """
    stream = io.BytesIO()
    around = _Around(stream, kinds)
    around.dump(value)
    return _layout(stream.getbuffer(), around.buffers), [item for _, item in around.found.values()]


class _Around(pickler.Pickler):
    def __init__(self, stream: io.BytesIO, kinds: Sequence[type]) -> None:
        self.buffers: list[pickle.PickleBuffer] = []
        super().__init__(stream, self.buffers.append)
        # By identity: index and part. The reference keeps the identity from being used again.
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
    """Return an encoding as an inline payload."""
    if media_type == JSON:
        return payload_pb2.Payload(media_type=JSON, json=data.decode())
    return payload_pb2.Payload(media_type=media_type, data=data)


class UnpicklingRefusedError(Exception):
    """A value is a pickle, and the caller did not say that it may be unpickled."""


def decode(media_type: str, data: bytes | bytearray, *, may_unpickle: bool) -> Any:
    """Return the decoded value; for an unknown media type the bytes. Raises UnpicklingRefusedError and any other."""
    if media_type in PICKLES and not may_unpickle:
        raise UnpicklingRefusedError
    match media_type or JSON:
        case "application/json":
            return json.loads(data)
        case tagged.MEDIA_TYPE:
            return tagged.decode(data)
        case arrays.NPY:
            return arrays.decode_array(data)
        case dataframes.ARROW:
            return dataframes.decode_frame(data)
        case "application/vnd.lattice.cloudpickle":
            return pickle.loads(data)
        case "application/vnd.lattice.pickle5":
            # Arrays over bytes would be read-only.
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
