"""Data frames of pandas and tables of pyarrow as Arrow IPC streams, which are decoded without running code.

pandas and pyarrow are imported only for such values. The client and the runner have the same file.

Rule: for any bytes the decoder returns a value or raises DataError. It accepts only the encoder's form: uncompressed
batches, and columns whose every value takes room in the stream, so that few bytes do not become many.
"""

import importlib.util
import struct
import sys
from typing import Any

from lattice_worker.runner.encoding.arrays import DataError

ARROW = "application/vnd.apache.arrow.stream"
# Names the library of the encoded value in the metadata of the schema; other streams are tables of pyarrow.
MARK, PANDAS = b"lattice.frame", b"pandas"
MAX_BYTES = 256 * 1024 * 1024
# Before it, pyarrow could unpickle types of columns.
OLDEST = 15
CONTINUATION = 0xFFFFFFFF
# Positions in the tables of the format's flatbuffers, and kinds of messages.
HEADER_KIND, HEADER, COMPRESSION, DATA = 1, 2, 3, 1
DICTIONARY, BATCH = 2, 3


def encode_frame(value: Any) -> list[Any] | None:
    """Return a data frame or a table as a stream; None for other values, and where pyarrow is missing or not exact."""
    try:
        table = _table_of(value)
    except Exception:  # Columns that Arrow has no type for.
        return None
    if table is None or not all(_is_plain(field.type) for field in table.schema):
        return None
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return [memoryview(sink.getvalue())]


def _table_of(value: Any) -> Any:
    """Return a table that a data frame can be made of again, or a table itself; None for other values."""
    name = f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}"
    if name == "pyarrow.Table" and MARK not in (value.schema.metadata or {}):
        return value
    pandas = sys.modules.get("pandas")
    if pandas is None or type(value) is not pandas.DataFrame or importlib.util.find_spec("pyarrow") is None:
        return None
    if len(set(map(type, value.columns))) > 1:
        return None  # Arrow makes texts of names.
    import pyarrow

    table = pyarrow.Table.from_pandas(value)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), MARK: PANDAS})
    return table if _is_same(value, table.to_pandas()) else None


def _is_same(frame: Any, other: Any) -> bool:
    """Whether two data frames are equal to the types of their columns and labels."""

    def same_labels(one: Any, two: Any) -> bool:
        return type(one) is type(two) and one.dtype == two.dtype and one.names == two.names and one.equals(two)

    return bool(
        frame.equals(other)
        and list(frame.dtypes) == list(other.dtypes)
        and same_labels(frame.index, other.index)
        and same_labels(frame.columns, other.columns)
        and frame.attrs == other.attrs
        and all(_has_same_kinds(frame.iloc[:, at], other.iloc[:, at]) for at in range(frame.shape[1]))
    )


def _has_same_kinds(column: Any, other: Any) -> bool:
    return column.dtype != object or all(type(a) is type(b) for a, b in zip(column, other, strict=True))


def decode_frame(data: Any) -> Any:
    """Return the data frame or the table in a stream. Raises DataError."""
    if len(data) > MAX_BYTES:
        raise DataError(f"a data frame has {len(data)} bytes; at most {MAX_BYTES} are decoded")
    try:
        return _frame(data)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"a data frame cannot be decoded: {type(error).__name__}: {error}") from error


def _frame(data: Any) -> Any:
    import pyarrow

    if int(pyarrow.__version__.partition(".")[0]) < OLDEST:
        raise DataError(f"data frames need pyarrow {OLDEST} or later; this is {pyarrow.__version__}")
    _refuse_compression(memoryview(data))
    with pyarrow.ipc.open_stream(pyarrow.py_buffer(data)) as reader:
        if strange := [field.name for field in reader.schema if not _is_plain(field.type)]:
            raise DataError(f"column {strange[0]!r:.80} has a type that is not decoded")
        table = reader.read_all()
    table.validate(full=True)
    if table.num_rows and not table.num_columns:
        raise DataError("a data frame has rows and no columns")
    return table.to_pandas() if (table.schema.metadata or {}).get(MARK) == PANDAS else table


def _is_plain(kind: Any) -> bool:
    """Whether each value of a type takes room in a stream, and pyarrow reads it without other code."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_plain(kind.index_type) and _is_plain(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return kind.num_fields > 0 and all(_is_plain(kind.field(at).type) for at in range(kind.num_fields))
    texts = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    return types.is_primitive(kind) or types.is_decimal(kind) or any(check(kind) for check in texts)


def _refuse_compression(view: memoryview) -> None:
    """Raise DataError for a stream with compressed batches: pyarrow would expand them before their size is known.

    A message is a length, a flatbuffer and a body; see the IPC format of Arrow.
    """
    offset = 0
    while offset + 8 <= len(view):
        mark, size = struct.unpack_from("<Ii", view, offset)
        if mark != CONTINUATION or size < 0:
            raise DataError("a stream is not framed as Arrow frames it")
        if size == 0:
            return
        message = view[offset + 8 : offset + 8 + size]
        root = struct.unpack_from("<I", message)[0]
        kind = _field(message, root, HEADER_KIND)
        table = _child(message, root, HEADER)
        if kind is not None and table is not None and message[kind] in {DICTIONARY, BATCH}:
            batch = _child(message, table, DATA) if message[kind] == DICTIONARY else table
            if batch is None or _field(message, batch, COMPRESSION) is not None:
                raise DataError("a stream with compressed batches is not decoded")
        body = _field(message, root, 3)
        length = 0 if body is None else struct.unpack_from("<q", message, body)[0]
        if length < 0:
            raise DataError("a message has a negative length")
        offset += 8 + size + length


def _field(message: memoryview, table: int, position: int) -> int | None:
    """Return where a field of a flatbuffer's table lies; None when it is not there."""
    (back,) = struct.unpack_from("<i", message, table)
    fields = table - back
    if fields < 0:
        raise DataError("a message has no table")
    (size,) = struct.unpack_from("<H", message, fields)
    if 4 + 2 * position >= size:
        return None
    (found,) = struct.unpack_from("<H", message, fields + 4 + 2 * position)
    return table + found if found else None


def _child(message: memoryview, table: int, position: int) -> int | None:
    found = _field(message, table, position)
    return None if found is None else found + int(struct.unpack_from("<I", message, found)[0])
