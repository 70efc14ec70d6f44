"""Large values in files: their bytes arrive whole, however they are written."""

import _thread
import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from lattice_worker.runner.artifacts import MIN_HALVED_BYTES, Encoder, open_artifact

SIZES = [0, 1, MIN_HALVED_BYTES - 1, MIN_HALVED_BYTES, MIN_HALVED_BYTES + 4097]


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    (tmp_path / "spares").mkdir()
    (tmp_path / "made").mkdir()
    return Encoder({"folder": str(tmp_path / "made"), "store": str(tmp_path), "inline_limit": -1})


def stored(encoder: Encoder, parts: list[bytes]) -> bytes:
    return bytes(open_artifact(os.path.join(encoder._folder, encoder.store("x/y", list(parts))["artifact"])))


@pytest.mark.parametrize("has_threads", [True, False])
def test_a_value_of_several_parts_is_stored_as_it_is(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, has_threads: bool
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise RuntimeError("can't start new thread")

    if not has_threads:
        monkeypatch.setattr(_thread, "start_new_thread", refuse)
    parts = [os.urandom(size) for size in SIZES]
    for some in ([], parts[3:4], parts, parts[::-1]):
        assert stored(encoder, some) == b"".join(some)


def test_an_error_of_the_second_half_is_raised_once_nothing_writes_any_more(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite
    descriptors: list[int] = []

    def write_first(descriptor: int, data: bytes, offset: int) -> int:
        descriptors.append(descriptor)
        if offset:
            raise OSError(errno.EIO, "input/output error")
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", write_first)
    with pytest.raises(OSError, match="input/output error"):
        stored(encoder, [bytes(MIN_HALVED_BYTES)])
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptors[0])
    assert os.listdir(encoder._folder) == []
