"""The lines of a service's program: the server keeps the newest ones, without secrets."""

import asyncio

import pytest

from lattice_worker.services.output import MAX_LINE_BYTES, Output

SECRET = "canary-0123456789"


def lines_of(written: bytes, *secrets: str) -> list[str]:
    """Return the reported lines of a program that wrote some bytes."""

    async def read() -> list[str]:
        output, stream = Output(secrets), asyncio.StreamReader()
        stream.feed_data(written)
        stream.feed_eof()
        await output.read(stream)
        return output.take()

    return asyncio.run(read())


@pytest.mark.parametrize("ending", [b"", b"\n"])
@pytest.mark.parametrize(
    "before", [0, *range(MAX_LINE_BYTES - len(SECRET) - 1, MAX_LINE_BYTES + 2), 3 * MAX_LINE_BYTES]
)
def test_secret_is_masked_when_its_line_is_cut_anywhere(before: int, ending: bytes) -> None:
    shown = "".join(lines_of(b"x" * before + SECRET.encode() + b"y" * MAX_LINE_BYTES * 2 + ending, SECRET))
    assert not any(part in shown for part in (SECRET[:8], SECRET[-8:], "canary"))


def test_long_line_without_an_end_is_reported_in_pieces() -> None:
    assert lines_of(b"x" * (MAX_LINE_BYTES + 1)) == ["x" * MAX_LINE_BYTES, "x"]


def test_last_part_of_a_progress_bar_is_reported() -> None:
    assert lines_of(b"1%\r2%\r100%\nend") == ["100%", "end"]
