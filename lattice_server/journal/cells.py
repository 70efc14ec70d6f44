"""Owns how a value lies in a column. Rule: a cell has a checksum and says whether it holds the value or names a file.

A cell is one byte of kind, four bytes of CRC-32 over the rest (big endian), and the rest: the value itself, or the
SHA-256 of a value in a file.
"""

from zlib import crc32

from lattice_server.engine.recording.journal_port import JournalDamagedError
from lattice_server.journal.files import Files

INLINE, FILE = b"\0", b"\1"
HEAD_BYTES = 5
MAX_INLINE_BYTES = 32 * 1024


class Cells:
    """Packs and unpacks values. Without `files` every value lies in its cell."""

    def __init__(self, files: Files | None) -> None:
        self._files = files

    def pack(self, data: bytes) -> tuple[bytes, str]:
        """Return the cell of a value, and the digest of the file that it names, if any."""
        if not data:
            return EMPTY, ""
        if self._files is None or len(data) <= MAX_INLINE_BYTES:
            return _cell(INLINE, data), ""
        digest = self._files.write(data)
        return _cell(FILE, bytes.fromhex(digest)), digest

    def unpack(self, cell: bytes) -> bytes:
        """Return the value of a cell. Raises JournalDamagedError."""
        kind, checksum, rest = cell[:1], cell[1:HEAD_BYTES], cell[HEAD_BYTES:]
        if crc32(rest, kind[0] if kind else 0).to_bytes(4, "big") != checksum or kind not in (INLINE, FILE):
            raise JournalDamagedError("the checksum of a value does not match")
        if kind == INLINE:
            return rest
        if self._files is None:
            raise JournalDamagedError("a value lies in a file, and this journal has none")
        return self._files.read(rest.hex())


def _cell(kind: bytes, rest: bytes) -> bytes:
    return b"%s%s%s" % (kind, crc32(rest, kind[0]).to_bytes(4, "big"), rest)


EMPTY = _cell(INLINE, b"")
