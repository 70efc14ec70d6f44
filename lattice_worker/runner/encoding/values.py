"""The codec of values: how one travels between processes.

Rule: JSON when it gives the value back exactly, so that any language can read it; cloudpickle otherwise. A sandboxed
process uses cloudpickle only when no encoding of data gives the value back exactly.
"""

import io
import json
import math
import pickle
import struct
from typing import Any

from lattice_worker.runner.encoding import arrays, dataframes, pickler, tagged

JSON = "application/json"
BYTES = "application/octet-stream"
CLOUDPICKLE = "application/vnd.lattice.cloudpickle"
PICKLE5 = "application/vnd.lattice.pickle5"
# Laid out as PICKLE5; the persistent ids of the pickle are positions in the list of values that travels beside it.
WITH_OUTPUTS = "application/vnd.lattice.pickle-with-outputs"
MAGIC = b"LTP5"
ALIGN = 64
# Python refuses to print and to read integers of over 4300 digits; these have fewer or as many.
MAX_JSON_INT_BITS = 14_284
MAX_JSON_LEVELS = 100
MAX_KEYS_SHOWN = 8
_to_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, check_circular=False).encode
_from_json = json.loads  # A task may put something else in its place.


class PayloadError(Exception):
    """A value or a function cannot be decoded, encoded or found."""


class PartError(PayloadError):
    """A value has no such part as a path names."""


def part_of(value: Any, path: list[str | int]) -> Any:
    """Return the part of a value at the end of a path: keys of mappings, and positions in lists. Raises PartError."""
    for number, step in enumerate(path):
        try:
            if isinstance(value, str | bytes):
                raise TypeError("a text is one value")
            value = value[step]
        except Exception as error:
            found = _described(value)
            steps = "".join(f"[{step!r}]" for step in path[:number])
            where = f"its part {steps}" if steps else "it"
            raise PartError(f"the output it is wired to has no part {steps}[{step!r}]: {where} is {found}") from error
    return value


def _described(value: Any) -> str:
    if type(value) is list:
        return f"a list of {len(value)}"
    if type(value) is not dict:
        return f"a value of type {type(value).__name__}"
    keys = [repr(key) for key in value if type(key) is str]
    return f"a dict with {', '.join(keys[:MAX_KEYS_SHOWN]) or 'no text as a key'}"


def among_json(value: Any, *kinds: type) -> list[Any] | None:
    """Return the parts of `value` that are of one of `kinds`, if JSON gives all the rest of it back exactly; else None.

    JSON has no references: a container that stands in two places, or within itself, would come back as several. Python
    reads and writes it by recursion, so that it is only for values that are not nested too deep.
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


def encode_value(value: Any, *, as_data: bool = False) -> tuple[str, list[Any]]:
    """Return a value's media type and its encoding, in parts; `as_data` avoids pickles as far as possible."""
    if is_json(value):
        return JSON, [_to_json(value).encode()]
    if type(value) is bytes:
        return BYTES, [value]
    if as_data:
        if (parts := arrays.encode_array(value)) is not None:
            return arrays.NPY, parts
        if (parts := dataframes.encode_frame(value)) is not None:
            return dataframes.ARROW, parts
        if (data := tagged.encode(value)) is not None:
            return tagged.MEDIA_TYPE, [data]
    buffers: list[pickle.PickleBuffer] = []
    stream = pickler.dumps(value, buffers.append)
    return (PICKLE5, _layout(stream, buffers)) if buffers else (CLOUDPICKLE, [stream])


def encode_around(value: Any, kind: type) -> tuple[list[Any], list[Any]]:
    """Return the encoding, as `WITH_OUTPUTS` and in parts, of a value without the parts that are of `kind`, and those.

    A part that stands in several places is returned once.
    """
    stream = io.BytesIO()
    around = _Around(stream, kind)
    around.dump(value)
    return _layout(stream.getbuffer(), around.buffers), [item for _, item in around.found.values()]


class _Around(pickler.Pickler):
    def __init__(self, stream: io.BytesIO, kind: type) -> None:
        self.buffers: list[pickle.PickleBuffer] = []
        super().__init__(stream, self.buffers.append)
        # By identity: each with its position, and kept so that no other one comes to have that identity.
        self.found: dict[int, tuple[int, Any]] = {}
        self._kind = kind

    def persistent_id(self, item: Any) -> int | None:
        if type(item) is not self._kind:
            return None
        return self.found.setdefault(id(item), (len(self.found), item))[0]


class _Rebuilt(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, buffers: list[Any], outputs: list[Any]) -> None:
        super().__init__(stream, buffers=buffers)
        self._outputs = outputs

    def persistent_load(self, position: int) -> Any:
        return self._outputs[position]


def _layout(stream: Any, buffers: list[pickle.PickleBuffer]) -> list[Any]:
    parts = [memoryview(stream), *(buffer.raw() for buffer in buffers)]
    out: list[Any] = [MAGIC + struct.pack(f"<IQ{len(parts)}Q", 1, len(parts), *(part.nbytes for part in parts))]
    offset = len(out[0])
    for part in parts:
        padding = -offset % ALIGN
        out += [b"\0" * padding, part]
        offset += padding + part.nbytes
    return out


def decode_value(media_type: str, data: Any, outputs: list[Any] | None = None) -> Any:
    """Return the value encoded in `data`, bytes or a memory map; `outputs` stand where it was encoded around some."""
    if media_type == JSON:
        return _from_json(bytes(data))
    if media_type == BYTES:
        return bytes(data)
    if media_type == CLOUDPICKLE:
        return pickle.loads(data)
    if media_type == tagged.MEDIA_TYPE:
        return tagged.decode(data)
    if media_type == arrays.NPY:
        return arrays.decode_array(data)
    if media_type == dataframes.ARROW:
        return dataframes.decode_frame(data)
    if media_type not in {PICKLE5, WITH_OUTPUTS}:
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
    if media_type == PICKLE5:
        return pickle.loads(parts[0], buffers=parts[1:])
    return _Rebuilt(io.BytesIO(parts[0]), parts[1:], outputs or []).load()
