"""Files that are written again: never one that is open or mapped anywhere, whoever claims it, and nothing is left."""

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import mmap
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lattice.v1 import payload_pb2

from lattice_worker.config import HEAD_STORE
from lattice_worker.runner.encoding import spare_files
from lattice_worker.runner.encoding.artifacts import Encoder, create_artifact, open_artifact
from lattice_worker.runner.encoding.spare_files import SPARES, claimed, delete_spares, opened
from lattice_worker.sandbox.results import inlined, screened
from lattice_worker.store.artifact_staging import ArtifactStaging
from lattice_worker.store.local_store import LocalStore
from lattice_worker.store.spare_keeper import SpareKeeper
from tests.leftovers import held_by
from tests.worker.head import Stream, pair

SIZE = 2 << 20
OLD, NEW = b"old " * (SIZE // 4), b"new " * (SIZE // 4)
ROOT = Path(__file__).resolve().parents[2]
FORK = multiprocessing.get_context("fork")
PATIENCE_S = 60.0


@pytest.fixture
def store() -> Iterator[Path]:
    """A store in memory."""
    with tempfile.TemporaryDirectory(prefix="lattice-t-", dir="/dev/shm") as folder:
        for name in (SPARES, "made"):
            (Path(folder) / name).mkdir()
        yield Path(folder)


def reusing(store: Path) -> bool:
    """Drop the value of the store, and write another one; return whether its file was written again."""
    found = (store / "value").stat().st_ino
    (store / "value").rename(store / SPARES / "spare")
    write(store, "other", NEW)
    return (store / "other").stat().st_ino == found


def write(store: Path, name: str, data: bytes) -> None:
    with create_artifact(str(store / name), str(store / SPARES), len(data)) as file:
        file.write(data)
        file.truncate(len(data))


def spares(store: Path) -> list[str]:
    return os.listdir(store / SPARES)


@contextlib.contextmanager
def mapped_without_descriptor(path: Path) -> Iterator[Callable[[], bytes]]:
    """A private mapping of which no descriptor is left; yield what returns its bytes."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size = ctypes.c_size_t(path.stat().st_size)
    with path.open("rb") as file:
        address = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, file.fileno(), 0)
    try:
        yield lambda: ctypes.string_at(address, size.value)
    finally:
        libc.munmap(ctypes.c_void_p(address), size)


@contextlib.contextmanager
def read_by_a_child(path: Path) -> Iterator[Callable[[], bytes]]:
    """A mapping that only a forked child has, which has closed its descriptors."""
    ours, theirs = FORK.Pipe()
    whole = open_artifact(str(path))

    def serve() -> None:
        for descriptor in set(range(3, 64)) - {theirs.fileno()}:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        theirs.send("ready")
        theirs.recv()
        theirs.send_bytes(bytes(whole))

    child = FORK.Process(target=serve)
    child.start()
    ours.recv()
    assert isinstance(whole, mmap.mmap)
    whole.close()

    def read() -> bytes:
        ours.send("read")
        return ours.recv_bytes()

    try:
        yield read
    finally:
        child.kill()
        child.join()


@contextlib.contextmanager
def open_for_reading(path: Path) -> Iterator[Callable[[], bytes]]:
    with opened(path) as file:
        yield file.read


@contextlib.contextmanager
def open_for_writing(path: Path) -> Iterator[Callable[[], bytes]]:
    with path.open("r+b") as file:
        yield file.read


@contextlib.contextmanager
def input_of_a_task(path: Path) -> Iterator[Callable[[], bytes]]:
    whole = open_artifact(str(path))
    yield lambda: bytes(whole)


READERS = [mapped_without_descriptor, read_by_a_child, open_for_reading, open_for_writing, input_of_a_task]


@pytest.mark.parametrize("reader", READERS)
def test_file_is_written_again_only_when_it_is_neither_open_nor_mapped(reader: Any, store: Path) -> None:
    (store / "value").write_bytes(OLD)
    with reader(store / "value") as read:
        assert not reusing(store)
        assert read() == OLD
        assert (store / "other").read_bytes() == NEW
        assert spares(store) == [], "its pages are freed with the last reader"
    (store / "other").rename(store / "value")
    assert reusing(store)
    assert (store / "other").read_bytes() == NEW


@pytest.mark.parametrize("reader", READERS)
def test_file_that_is_open_or_mapped_becomes_no_spare(reader: Any, store: Path) -> None:
    async def scenario() -> None:
        keeper = SpareKeeper(str(store))
        keeper.open()
        (store / "value").write_bytes(OLD)
        with reader(store / "value"):
            assert not keeper.keep(store / "value")
        assert keeper.keep(store / "value")
        keeper.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("size", [SIZE // 2, SIZE - 1, SIZE, SIZE * 2])
def test_value_has_its_own_length_when_its_file_had_another(size: int, store: Path) -> None:
    (store / SPARES / "spare").write_bytes(b"secret of another tenant ".ljust(SIZE, b"!"))
    before = (store / SPARES / "spare").stat().st_ino
    encoder = Encoder({"folder": str(store / "made"), "store": str(store), "inline_limit": 0})
    made = encoder.store("x/y", [b"a" * (size // 2), b"b" * (size - size // 2)])["artifact"]
    assert (store / "made" / made).stat().st_ino == before
    assert (store / "made" / made).read_bytes() == b"a" * (size // 2) + b"b" * (size - size // 2)


@pytest.mark.parametrize("size", [spare_files.MIN_SPARE_BYTES - 1, SIZE // 2 - 1, SIZE * 2 + 2])
def test_spare_is_left_for_others_when_it_does_not_suit(size: int, store: Path) -> None:
    (store / SPARES / "spare").write_bytes(bytes(SIZE))
    assert claimed(str(store / "made" / "a"), str(store / SPARES), size) is None
    assert spares(store) == ["spare"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EAGAIN, errno.EACCES, errno.ENOSYS])
def test_files_are_deleted_and_never_written_again_where_leases_are_refused(
    number: int, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    (store / "value").write_bytes(OLD)
    assert not reusing(store)
    assert (store / "other").read_bytes() == NEW

    async def scenario() -> None:
        local_store = LocalStore(str(store), "n", ArtifactStaging(str(store)), lambda: None)
        with local_store.opened():
            local_store.drop(["other"])
            assert (spares(store), (store / "other").exists()) == ([], False)

    asyncio.run(scenario())


@pytest.mark.skipif(os.geteuid() != 0, reason="file systems are mounted")
def test_no_spares_are_kept_where_the_kernel_does_not_count_mappings(short_path: Path) -> None:
    script = """
import asyncio, os, sys
from pathlib import Path
from lattice_server.engine.stores import spare_keeper as of_server
from lattice_worker.store import spare_keeper as of_worker
async def main():
    for folder in map(Path, sys.argv[1:]):
        (folder / "value").write_bytes(bytes(2 << 20))
        server = of_server.SpareKeeper(folder, 1 << 30)
        print(server.keep(folder / "value"), end=" ")
        (folder / "value").write_bytes(bytes(2 << 20))
        worker = of_worker.SpareKeeper(str(folder))
        worker.open()
        print(worker.keep(folder / "value"))
        worker.close()
        server.close()
asyncio.run(main())
"""
    (short_path / "script.py").write_text(script)
    mounts = """set -e; cd $1; mkdir memory overlay; mount -t tmpfs none memory; mkdir memory/low memory/up memory/work
mount -t overlay overlay -o lowerdir=memory/low,upperdir=memory/up,workdir=memory/work overlay
mkdir memory/store overlay/store; PYTHONPATH=$2 exec $3 script.py memory/store overlay/store"""
    command = ["unshare", "-m", "sh", "-c", mounts, "sh", str(short_path), str(ROOT), sys.executable]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE_S)
    if "overlay" in done.stderr:
        pytest.skip(f"overlayfs cannot be mounted: {done.stderr}")
    assert done.stdout.splitlines() == ["True True", "False False"], done.stderr


@pytest.mark.parametrize("by_another", [True, False])
def test_reader_finds_no_value_when_its_file_is_dropped_as_it_is_opened(
    by_another: bool, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store / "value").write_bytes(OLD)
    status = os.fstat

    def drop_and_look(descriptor: int) -> os.stat_result:
        monkeypatch.setattr(os, "fstat", status)
        (store / "value").rename(store / SPARES / "spare")
        if by_another:
            (store / "value").write_bytes(NEW)
        return status(descriptor)

    monkeypatch.setattr(os, "fstat", drop_and_look)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        opened(store / "value")
    assert len(os.listdir("/proc/self/fd")) == before


def test_process_survives_that_a_reader_breaks_its_lease(store: Path) -> None:
    """The signal for it ends a process by default, and comes to any thread."""
    (store / "value").write_bytes(OLD)
    script = """
import fcntl, os, signal, sys
sys.path.insert(0, sys.argv[2])
from lattice_worker.runner.encoding.spare_files import is_unused
own = fcntl.fcntl
def lease(descriptor, command, argument):
    found = own(descriptor, command, argument)
    if argument == fcntl.F_WRLCK:
        if os.fork() == 0:
            os.open(sys.argv[1], os.O_RDONLY)
            os._exit(0)
        while own(descriptor, fcntl.F_GETLEASE) == fcntl.F_WRLCK:
            pass
    return found
fcntl.fcntl = lease
with open(sys.argv[1], "r+b") as file:
    is_unused(file.fileno())
print("alive")
"""
    command = [sys.executable, "-c", script, str(store / "value"), str(ROOT)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_each_spare_goes_to_one_of_many_claimers(store: Path) -> None:
    found, rounds, claimers = set(), 5, 4
    for number in range(rounds):
        for spare in range(claimers - 1):
            (store / SPARES / f"{number}-{spare}").write_bytes(OLD)
            found.add((store / SPARES / f"{number}-{spare}").stat().st_ino)
        start = FORK.Event()

        def claim(number: int, claimer: int, start: Any = start) -> None:
            start.wait()
            data = bytes([claimer]) * SIZE
            write(store, f"{number}-{claimer}", data)

        started = [FORK.Process(target=claim, args=(number, claimer)) for claimer in range(claimers)]
        for process in started:
            process.start()
        start.set()
        for process in started:
            process.join(PATIENCE_S)
            assert process.exitcode == 0
        assert spares(store) == []
        made = [store / f"{number}-{claimer}" for claimer in range(claimers)]
        assert [path.read_bytes() for path in made] == [bytes([claimer]) * SIZE for claimer in range(claimers)]
        assert len({path.stat().st_ino for path in made} & found) == claimers - 1
        for path in made:
            path.unlink()
        found.clear()


def test_writer_that_is_killed_leaves_neither_its_file_nor_a_spare(store: Path) -> None:
    (store / SPARES / "spare").write_bytes(OLD)
    staging = ArtifactStaging(str(store))
    with staging.opened():
        folder = staging.folder()
        ours, theirs = FORK.Pipe()

        def write_half() -> None:
            file = create_artifact(os.path.join(folder, "a"), str(store / SPARES), SIZE)
            file.write(NEW[: SIZE // 2])
            theirs.send("half")
            signal.pause()

        writer = FORK.Process(target=write_half)
        writer.start()
        ours.recv()
        assert os.listdir(folder) == ["a"]
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        staging.discard(folder)  # As the agent does when a process is gone.
    assert [path for path in store.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    "seed", [seed if seed < 3 else pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(8)]
)
def test_values_stay_as_they_were_written_while_others_are_written_and_dropped(seed: int, store: Path) -> None:
    rng = random.Random(seed)
    keeper = SpareKeeper(str(store), limit_bytes=6 * SIZE)
    stored: dict[str, bytes] = {}
    held: list[tuple[bytes, Any]] = []
    reused: set[int] = set()
    inodes: set[int] = set()

    async def scenario() -> None:
        keeper.open()
        for number in range(120):
            match rng.choice(["write", "write", "map", "read", "release", "drop", "drop"]):
                case "write":
                    data = bytes([number]) * rng.randint(SIZE // 2, SIZE * 2)
                    write(store, str(number), data)
                    inode = (store / str(number)).stat().st_ino
                    (reused if inode in inodes else inodes).add(inode)
                    stored[str(number)] = data
                case "map" if stored:
                    name = rng.choice(list(stored))
                    held.append((stored[name], open_artifact(str(store / name))))
                case "read" if stored:
                    name = rng.choice(list(stored))
                    held.append((stored[name], opened(store / name)))
                case "release" if held:
                    held.pop(rng.randrange(len(held)))[1].close()
                case "drop" if stored:
                    name = rng.choice(list(stored))
                    del stored[name]
                    if not keeper.keep(store / name):
                        (store / name).unlink()
            kept = sum((store / SPARES / spare).stat().st_size for spare in spares(store))
            assert kept <= 6 * SIZE
            for data, found in held:
                found.seek(0)
                assert found.read() == data
            for name, data in stored.items():
                assert (store / name).read_bytes() == data
        keeper.close()

    asyncio.run(scenario())
    assert reused, "the test is about files that are written again"
    assert spares(store) == []
    for _, found in held:
        found.close()


def test_spares_are_bounded_and_deleted_when_idle_and_at_the_end(store: Path) -> None:
    async def scenario() -> None:
        keeper = SpareKeeper(str(store), limit_bytes=3 * SIZE - 1, idle_s=0.0)
        keeper.open()
        for number in range(3):
            (store / str(number)).write_bytes(OLD)
        assert [keeper.keep(store / str(number)) for number in range(3)] == [True, True, False]
        (store / "small").write_bytes(b"x")
        assert not keeper.keep(store / "small")
        async with asyncio.timeout(PATIENCE_S):
            while spares(store):
                await asyncio.sleep(0.01)
        assert keeper.keep(store / "2")
        keeper.close()
        assert spares(store) == []
        (store / "late").write_bytes(OLD)
        assert not keeper.keep(store / "late")

    asyncio.run(scenario())


def test_worker_begins_without_the_spares_of_a_killed_one_and_lists_none(store: Path) -> None:
    (store / SPARES / "left").write_bytes(OLD)

    async def scenario() -> None:
        local_store = LocalStore(str(store), "n", ArtifactStaging(str(store)), lambda: None)
        with local_store.opened():
            assert spares(store) == []
            (store / "value").write_bytes(OLD)
            local_store.drop(["value"])
            assert len(spares(store)) == 1
            assert local_store.stored() == []
            with pytest.raises(FileNotFoundError):
                local_store.open("value")
        assert spares(store) == []

    asyncio.run(scenario())


def test_worker_beside_the_server_leaves_its_spares_alone(store: Path) -> None:
    (store / SPARES / "spare").write_bytes(OLD)
    local_store = LocalStore(str(store), HEAD_STORE, ArtifactStaging(str(store)), lambda: None)
    with local_store.opened():
        (store / "copy").write_bytes(OLD)
        local_store.drop(["copy"])
        assert not (store / "copy").exists()
    assert spares(store) == ["spare"]


def test_deleting_spares_says_whether_there_were_any(store: Path) -> None:
    assert not delete_spares(str(store / "missing"))
    assert not delete_spares(str(store / SPARES))
    (store / SPARES / "spare").write_bytes(b"x")
    assert delete_spares(str(store / SPARES))
    assert spares(store) == []


def test_values_of_a_sandbox_are_written_to_new_files(store: Path) -> None:
    (store / SPARES / "spare").write_bytes(OLD)
    head = {"kind": "result", "id": "i", "duration": 0.0, "has_raw": False}
    answer = head | {"outputs": {"out": {"type": "application/octet-stream", "blob": 0}}}
    found, _ = screened(answer, [NEW], str(store), str(store / "made"), 10)
    assert spares(store) == ["spare"]
    assert (store / "made" / found["made"][0]).read_bytes() == NEW


def test_input_of_a_sandbox_is_read_whole_while_its_file_is_dropped(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store / "value").write_bytes(OLD)
    own = spare_files.opened
    dropped: list[bool] = []

    def open_and_drop(path: str) -> Any:
        file = own(path)
        dropped.append(reusing(store))
        return file

    monkeypatch.setattr("lattice_worker.sandbox.results.opened", open_and_drop)
    blobs: list[bytes] = []
    inlined({"type": "x/y", "path": str(store / "value")}, blobs)
    assert blobs == [OLD]
    assert dropped == [False]


@pytest.mark.slow
def test_arrays_that_tasks_keep_stay_right_while_tenants_write_and_drop_many_values() -> None:
    def make(number: int, size: int) -> Any:
        import numpy

        return numpy.full(size, number, dtype=numpy.uint8)

    def keep(array: Any, number: int) -> list[int]:
        """Keep an array of this process, and return how many are kept and how many of them have changed."""
        import numpy

        kept = numpy.__dict__.setdefault("kept", [])
        if number % 3 == 0:
            kept.append((number, array))
        wrong = [found for found, values in [*kept, (number, array)] if not (values == found).all()]
        if len(kept) > 4:
            del kept[0]
        return [len(kept), len(wrong)]

    async def made(stream: Stream, number: int) -> payload_pb2.Payload:
        size = SIZE + number % 5 * 300_001
        lease = f"make-{number}"
        stream.assign(lease, make, inputs={"number": number, "size": size}, tenant="ab"[number % 2], slot=number % 2)
        payload: payload_pb2.Payload = (await stream.end(lease)).succeeded.outputs["out"]
        assert payload.WhichOneof("content") == "artifact", payload
        return payload

    async def scenario() -> None:
        async with pair(None) as both:
            stream = both.stream
            (folder,) = [found for found in held_by([both.process.pid]) if found.parent == Path("/dev/shm")]
            inodes: set[int] = set()
            kept, reused = 0, 0
            for number in range(40):
                payload = await made(stream, number)
                inode = (folder / payload.artifact.artifact_id).stat().st_ino
                reused += inode in inodes
                inodes.add(inode)
                lease = f"keep-{number}"
                inputs = {"array": payload, "number": number}
                stream.assign(lease, keep, inputs=inputs, tenant="ab"[number // 2 % 2], slot=number % 2)
                found, wrong = await stream.value(lease)
                assert wrong == 0
                kept += found
                stream.say(
                    drop_artifact_ids=[payload.artifact.artifact_id],
                    acknowledged_sequence=max(report.sequence for report in stream.reports),
                )
            assert kept, "the test is about arrays that are kept"
            assert reused, "the test is about files that are written again"
        assert not folder.exists()

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))
