"""Tagged JSON: an encoding that decodes without running code, for values that JSON alone lacks.

A tag is an object with one key, which begins with `$`; `docs/contract.md` lists the tags. The client and the runner
have the same file.

Rule: for any bytes `decode` returns a value or raises DataError. `encode` returns None for a value that would
not be decoded exactly.
"""

import base64
import binascii
import json
import math
import re
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

from lattice_worker.runner.encoding.arrays import DataError, decode_array, decode_scalar, encode_array, encode_scalar

MEDIA_TYPE = "application/vnd.lattice.tagged+json"
MAX_BYTES = 256 * 1024 * 1024
MAX_LEVELS = 100
# Tuples within keys are written once for each place; without a limit nested ones could grow exponentially.
MAX_VALUES = 20_000_000
# Above it, other languages read a number of JSON as another number.
MAX_NUMBER = 2**53 - 1
SHARED, SAME = "$shared", "$same"
DICT = "$dict"
_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_HEX = re.compile(r"-?0x[0-9a-f]+")
_ZONE = re.compile(r"[A-Za-z0-9_+-]+(?:/[A-Za-z0-9_+-]+){0,3}")
_CONTAINERS = frozenset({list, dict, set, tuple, frozenset})
_FIXED = frozenset({type(None), bool, int, float, complex, str, bytes, Decimal, UUID, date, datetime, time, timedelta})


class _NotDataError(Exception):
    """A value that tagged JSON cannot represent exactly."""


def encode(value: Any) -> bytes | None:
    """Return the encoding of a value; None when tagged JSON cannot represent it exactly."""
    try:
        node = _Encoder(value).node(value, 0, is_key=False)
    except (_NotDataError, RecursionError):
        return None
    return json.dumps(node, separators=(",", ":"), ensure_ascii=False, check_circular=False, allow_nan=False).encode()


class _Encoder:
    """Makes the JSON of one value. Containers that stand in several places are numbered, so that they stay one."""

    def __init__(self, value: Any) -> None:
        self._shared = _shared_in(value)
        self._numbers: dict[int, int] = {}
        self._open: set[int] = set()
        self._left = MAX_VALUES

    def node(self, value: Any, level: int, *, is_key: bool) -> Any:
        """Return the JSON of a value; `is_key` within keys and sets, whose values are hashed and not numbered."""
        self._left -= 1
        if level > MAX_LEVELS or self._left < 0:
            raise _NotDataError
        kind, mark = type(value), id(value)
        if kind not in _CONTAINERS and mark not in self._shared:
            return _scalar(value, kind)
        if mark in self._open:  # a cycle
            raise _NotDataError
        if not is_key and mark in self._numbers:
            return {SAME: self._numbers[mark]}
        self._open.add(mark)
        made = self._container(value, kind, level + 1, is_key=is_key) if kind in _CONTAINERS else _scalar(value, kind)
        self._open.discard(mark)
        if is_key or mark not in self._shared:
            return made
        number = self._numbers[mark] = len(self._numbers)
        return {SHARED: [number, made]}

    def _container(self, value: Any, kind: type, level: int, *, is_key: bool) -> Any:
        if kind is list:
            return [self.node(item, level, is_key=is_key) for item in value]
        if kind is dict:
            if all(type(key) is str and not key.startswith("$") and _is_unicode(key) for key in value):
                return {key: self.node(item, level, is_key=is_key) for key, item in value.items()}
            pairs = value.items()
            return {DICT: [[self.node(k, level, is_key=True), self.node(v, level, is_key=is_key)] for k, v in pairs]}
        is_key = is_key or kind is not tuple
        return {f"${kind.__name__}": [self.node(item, level, is_key=is_key) for item in value]}


def _shared_in(value: Any) -> set[int]:
    """Return the identities of the values that stand in several places outside of keys and sets, and may be changed."""
    seen: set[int] = set()
    shared: set[int] = set()
    frontier = [value]
    while frontier:
        found = frontier.pop()
        kind = type(found)
        if kind in _FIXED or (kind is tuple and not any(type(item) not in _FIXED for item in found)):
            continue  # A copy of it is the same value.
        if id(found) in seen:
            shared.add(id(found))
            continue
        seen.add(id(found))
        if kind is list or kind is tuple:
            frontier += found
        elif kind is dict:
            frontier += found.values()
    return shared


def _scalar(value: Any, kind: type) -> Any:
    if value is None or kind is bool:
        return value
    if kind is str:
        return value if _is_unicode(value) else {"$str": list(map(ord, value))}
    if kind is int:
        return value if -MAX_NUMBER <= value <= MAX_NUMBER else {"$int": hex(value)}
    if kind is float:
        return _number(value)
    if (made := _WRITERS.get(kind)) is not None:
        return {f"${kind.__name__.lower()}": made(value)}
    if (scalar := encode_scalar(value)) is not None:
        return {"$scalar": _to_base64(scalar)}
    if (array := encode_array(value)) is not None:
        return {"$array": _to_base64(b"".join(array))}
    raise _NotDataError


def _number(value: float) -> Any:
    if math.isfinite(value):
        return value
    return {"$float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _to_base64(data: Any) -> str:
    return base64.b64encode(data).decode()


def _write_moment(value: datetime | time) -> Any:
    """Return an ISO text, or a list of one without its zone, the fold and the name of the zone."""
    zone = value.tzinfo
    if zone is not None and type(zone) is not timezone and (type(zone) is not ZoneInfo or zone.key is None):
        raise _NotDataError
    if type(zone) is ZoneInfo:
        if not _ZONE.fullmatch(zone.key):
            raise _NotDataError
        return [value.replace(tzinfo=None, fold=0).isoformat(), value.fold, zone.key]
    if zone is not None and zone.tzname(None) != timezone(_offset(zone)).tzname(None):
        raise _NotDataError  # a zone with a name of its own
    return [value.replace(fold=0).isoformat(), value.fold, None] if value.fold else value.isoformat()


def _offset(zone: Any) -> timedelta:
    found = zone.utcoffset(None)
    assert isinstance(found, timedelta)
    return found


_WRITERS: dict[type, Callable[[Any], Any]] = {
    bytes: _to_base64,
    bytearray: _to_base64,
    complex: lambda value: [_number(value.real), _number(value.imag)],
    Decimal: str,
    UUID: str,
    date: date.isoformat,
    datetime: _write_moment,
    time: _write_moment,
    timedelta: lambda value: [value.days, value.seconds, value.microseconds],
}


# Decoding.


def decode(data: Any) -> Any:
    """Return the value in an encoding: bytes, or a buffer of them. Raises DataError."""
    if len(data) > MAX_BYTES:
        raise DataError(f"tagged JSON has {len(data)} bytes; at most {MAX_BYTES} are decoded")
    try:
        node = json.loads(bytes(data).decode(), object_pairs_hook=_object, parse_constant=_refuse_constant)
        return _Decoder().value(node, 0, is_key=False)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"tagged JSON cannot be decoded: {type(error).__name__}: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise DataError("an object has a key twice")
    return found


def _refuse_constant(name: str) -> None:
    raise DataError(f"{name} is no JSON")


class _Decoder:
    """Makes one value of its JSON, lists and objects in place."""

    def __init__(self) -> None:
        self._shared: dict[int, Any] = {}

    def value(self, node: Any, level: int, *, is_key: bool) -> Any:
        """Return the value of a node; `is_key` within keys and sets, where no container may be numbered."""
        if level > MAX_LEVELS + 1:
            raise DataError(f"values are nested more than {MAX_LEVELS} deep")
        kind = type(node)
        if kind is list:
            for index, item in enumerate(node):
                node[index] = self.value(item, level + 1, is_key=is_key)
            return node
        if kind is dict:
            tag = next(iter(node), "")
            if len(node) == 1 and tag.startswith("$"):
                return self._tagged(tag, node[tag], level, is_key=is_key)
            for key, item in node.items():
                if key.startswith("$"):
                    raise DataError(f"a tag stands alone in its object; {key!r} does not")
                node[key] = self.value(item, level + 1, is_key=is_key)
            return node
        if kind is float and not math.isfinite(node):
            raise DataError("a number is too large")
        return node

    def _tagged(self, tag: str, body: Any, level: int, *, is_key: bool) -> Any:
        if tag == SHARED and not is_key:
            number, node = _list(body, 2)
            found = self.value(node, level, is_key=False)
            if type(number) is not int or number in self._shared:
                raise DataError(f"{number!r} numbers no value, or two")
            self._shared[number] = found
            return found
        if tag == SAME and not is_key:
            if type(body) is not int or body not in self._shared:
                raise DataError(f"no value before has the number {body!r}")
            return self._shared[body]
        if tag == DICT:
            return self._dict(_list(body), level, is_key=is_key)
        if tag == "$tuple":
            return tuple(self.value(_list(body), level, is_key=is_key))
        if tag in {"$set", "$frozenset"}:
            items = self.value(_list(body), level, is_key=True)
            made = set(items) if tag == "$set" else frozenset(items)
            if len(made) != len(items):
                raise DataError("a set has an item twice")
            return made
        if (read := _READERS.get(tag)) is None:
            raise DataError(f"{tag!r} is no tag here")
        return read(body)

    def _dict(self, pairs: list[Any], level: int, *, is_key: bool) -> dict[Any, Any]:
        made = {}
        for pair in pairs:
            key, item = _list(pair, 2)
            made[self.value(key, level + 1, is_key=True)] = self.value(item, level + 1, is_key=is_key)
        if len(made) != len(pairs):
            raise DataError("a dict has a key twice")
        return made


def _list(body: Any, length: int | None = None) -> list[Any]:
    if type(body) is not list or (length is not None and len(body) != length):
        raise DataError("the value of a tag has another form than its tag")
    return body


def _text(body: Any) -> str:
    if type(body) is not str:
        raise DataError("the value of a tag is not a text")
    return body


def _matching(pattern: re.Pattern[str], body: Any) -> str:
    if not pattern.fullmatch(text := _text(body)):
        raise DataError(f"{text[:40]!r} is not of the form of its tag")
    return text


def _exactly(read: Callable[[str], Any], body: Any) -> Any:
    found = read(text := _text(body))
    if str(found) != text:
        raise DataError(f"{text[:40]!r} is not of the form of its tag")
    return found


def _from_base64(body: Any) -> bytes:
    try:
        return binascii.a2b_base64(_text(body), strict_mode=True) if body else b""
    except ValueError as error:
        raise DataError(f"a value is not base64: {error}") from None


def _int(body: Any) -> int:
    if type(body) is not int:
        raise DataError("a part of a value is not a whole number")
    return body


def _float(body: Any) -> float:
    if type(body) is dict and len(body) == 1 and "$float" in body:
        return _WORDS[_text(body["$float"])]
    if type(body) is not float or not math.isfinite(body):
        raise DataError("a part of a value is not a number")
    return body


def _read_moment(body: Any, kind: Any) -> Any:
    text, fold, zone = (body, 0, None) if type(body) is str else _list(body, 3)
    found = kind.fromisoformat(_text(text))
    if found.isoformat() != text or type(fold) is not int or (zone is not None and found.tzinfo is not None):
        raise DataError(f"{text[:40]!r} is not in the ISO form of a {kind.__name__}")
    found = found.replace(fold=fold)
    return found if zone is None else found.replace(tzinfo=ZoneInfo(_matching(_ZONE, zone)))


_READERS: dict[str, Callable[[Any], Any]] = {
    "$str": lambda body: "".join(chr(_int(point)) for point in _list(body)),
    "$int": lambda body: int(_matching(_HEX, body), 16),
    "$float": lambda body: _WORDS[_text(body)],
    "$bytes": _from_base64,
    "$bytearray": lambda body: bytearray(_from_base64(body)),
    "$complex": lambda body: complex(*map(_float, _list(body, 2))),
    "$decimal": lambda body: _exactly(Decimal, body),
    "$uuid": lambda body: _exactly(UUID, body),
    "$date": lambda body: _exactly(date.fromisoformat, body),
    "$datetime": lambda body: _read_moment(body, datetime),
    "$time": lambda body: _read_moment(body, time),
    "$timedelta": lambda body: timedelta(*map(_int, _list(body, 3))),
    "$scalar": lambda body: decode_scalar(_from_base64(body)),
    "$array": lambda body: decode_array(_from_base64(body)),
}
