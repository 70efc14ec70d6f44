"""What a host gives to another: parts of a file of its store, as they are."""

import json
import pickle
import socket
from pathlib import Path

import pytest

from lattice_server.executors import exchange
from lattice_server.executors.exchange import Exchange, Part


def bytes_of(part: Part) -> bytes:
    """Return what arrives at the other end."""
    return bytes(pickle.loads(pickle.dumps(part, protocol=5)))


def serving(store: Path) -> Exchange:
    """Return an exchange whose worker has said where its store is, and left."""
    found = Exchange()
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(json.dumps({"store": str(store)}).encode() + b"\n")
    found.serve(ours)
    return found


def test_a_value_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "PART_BYTES", 4)
    (tmp_path / "value").write_bytes(b"some bytes")
    found = serving(tmp_path)
    assert [bytes_of(found.read("value", offset)) for offset in (0, 4, 8)] == [b"some", b" byt", b"es"]


@pytest.mark.parametrize("name", ["missing", "../value"])
def test_only_what_is_in_the_store_is_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "value").write_bytes(b"some bytes")
    store = tmp_path / "store"
    store.mkdir()
    with pytest.raises(FileNotFoundError):
        serving(store).read(name, 0)


def test_without_a_worker_nothing_is_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Exchange().read("value", 0)
