"""The exchange of a host: the parts of files that it sends to other hosts, and the values that it fetches."""

import json
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from lattice_server.executors import ray_transfer
from lattice_server.executors.ray_transfer import AHEAD, Exchange, Part, host_name
from lattice_worker.runner.encoding.spare_files import is_unused

PATIENCE_S = 7.0
VALUE = bytes(range(4 * 3 * AHEAD + 1))


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
    monkeypatch.setattr(ray_transfer, "PART_BYTES", 4)
    (tmp_path / "value").write_bytes(b"some bytes")
    found = serving(tmp_path)
    assert [bytes_of(found.read("value", offset)) for offset in (0, 4, 8)] == [b"some", b" byt", b"es"]


@pytest.mark.parametrize("name", ["missing", "../value"])
def test_only_files_of_the_store_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "value").write_bytes(b"some bytes")
    store = tmp_path / "store"
    store.mkdir()
    with pytest.raises(FileNotFoundError):
        serving(store).read(name, 0)


def test_without_a_worker_nothing_is_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Exchange().read("value", 0)


def test_a_dropped_file_is_not_reused_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "value"
    path.write_bytes(b"some bytes")
    part = serving(tmp_path).read("value", 0)
    with path.open("r+b") as spare:
        assert not is_unused(spare.fileno())
        del part
        assert is_unused(spare.fileno())


@pytest.mark.parametrize("by_another", [True, False])
def test_a_file_dropped_just_before_it_is_opened_is_not_read(
    by_another: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "value"
    path.write_bytes(b"some bytes")
    found, status = serving(tmp_path), os.fstat

    def drop_and_look(descriptor: int) -> os.stat_result:
        monkeypatch.setattr(os, "fstat", status)
        path.rename(tmp_path / "spare")
        if by_another:
            path.write_bytes(b"other bytes")
        return status(descriptor)

    monkeypatch.setattr(os, "fstat", drop_and_look)
    with pytest.raises(FileNotFoundError):
        found.read("value", 0)


class Rays:
    """Ray, as far as an exchange asks it: the hosts of other nodes, and the bytes that they read.

    `hosts` may be changed by a test: reads of one that is not there any more fail.
    """

    def __init__(self, **hosts: Exchange) -> None:
        self.hosts = {host_name(node): host for node, host in hosts.items()}
        self.looked_up: list[str] = []
        self.timeouts: list[float] = []
        self.most_ahead = self._ahead = 0

    def get_actor(self, name: str) -> Any:
        """Return a handle. Raises ValueError for a host that is not there."""
        self.looked_up.append(name)
        if name not in self.hosts:
            raise ValueError(f"no actor is called {name}")
        host = self.hosts[name]

        class Handle:
            """What `host.read.remote` is with Ray."""

            @staticmethod
            def remote(artifact_id: str, offset: int) -> Callable[[], bytes]:
                """Return a reference to the part."""
                self._ahead += 1
                self.most_ahead = max(self.most_ahead, self._ahead)

                def read() -> bytes:
                    if self.hosts.get(name) is not host:
                        raise ray.exceptions.RayActorError(error_msg="it died")
                    return bytes_of(host.read(artifact_id, offset))

                return read

        return type("Host", (), {"read": Handle})

    def get(self, coming: Callable[[], bytes], timeout: float) -> bytes:
        """Return the part."""
        self._ahead -= 1
        self.timeouts.append(timeout)
        return coming()


class Worker:
    """The worker of an exchange: asks for values of node `a` and reads the answers."""

    def __init__(self, found: Exchange, folder: Path) -> None:
        self._ours, theirs = socket.socketpair()
        self._lines = self._ours.makefile("rb")
        self._serving = threading.Thread(target=found.serve, args=(theirs,), daemon=True)
        self._serving.start()
        self.part = folder / "value.part"

    def fetch(self, size: int) -> tuple[int, str]:
        """Ask for a value; return how many steps it took and how it ended."""
        wanted = {"id": 5, "node": "a", "artifact": "value", "size": size, "part": str(self.part)}
        self._ours.sendall(json.dumps(wanted | {"patience_s": PATIENCE_S}).encode() + b"\n")
        for steps, line in enumerate(self._lines):
            answer = json.loads(line)
            assert answer["id"] == 5
            if "end" in answer:
                return steps, answer["end"]
        raise AssertionError("there was no end")

    def go(self) -> None:
        """Close the connection; its threads end."""
        self._lines.close()
        self._ours.close()
        self._serving.join(PATIENCE_S)
        assert not self._serving.is_alive()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    """A worker and its exchange; when it goes, that ends."""
    found = Worker(Exchange(), tmp_path)
    yield found
    found.go()


@pytest.fixture
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rays:
    """A Ray in which node `a` has a value, to be read in parts of four bytes."""
    monkeypatch.setattr(ray_transfer, "PART_BYTES", 4)
    store = tmp_path / "a"
    store.mkdir()
    (store / "value").write_bytes(VALUE)
    found = Rays(a=serving(store))
    monkeypatch.setattr(ray, "get_actor", found.get_actor)
    monkeypatch.setattr(ray, "get", found.get)
    return found


def test_a_value_is_fetched_step_by_step_and_whole(others: Rays, worker: Worker) -> None:
    for _ in range(2):
        worker.part.write_bytes(b"")
        assert worker.fetch(len(VALUE)) == (3 * AHEAD + 1, "")
        assert worker.part.read_bytes() == VALUE
    assert others.most_ahead == AHEAD
    assert set(others.timeouts) == {PATIENCE_S}
    assert others.looked_up == [host_name("a")]


@pytest.mark.parametrize("size", [len(VALUE) - 4, len(VALUE) + 1, 5 * len(VALUE)])
def test_a_value_of_another_size_is_refused(size: int, others: Rays, worker: Worker) -> None:
    worker.part.write_bytes(b"")
    _, end = worker.fetch(size)
    assert "bytes" in end


def test_a_host_that_is_gone_is_looked_up_again(others: Rays, worker: Worker, tmp_path: Path) -> None:
    worker.part.write_bytes(b"")
    assert worker.fetch(len(VALUE))[1] == ""
    name, _ = others.hosts.popitem()
    worker.part.write_bytes(b"")
    assert worker.fetch(len(VALUE))[1] != ""
    others.hosts[name] = serving(tmp_path / "a")
    worker.part.write_bytes(b"")
    assert worker.fetch(len(VALUE))[1] == ""
    assert worker.part.read_bytes() == VALUE


def test_a_value_is_not_written_when_its_worker_no_longer_waits(others: Rays, worker: Worker) -> None:
    _, end = worker.fetch(len(VALUE))
    assert end
    assert not worker.part.exists()
    assert not others.looked_up
