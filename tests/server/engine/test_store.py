"""The artifacts of the head: written, read from an offset, held, dropped, and never outside their directory."""

import asyncio
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from lattice_server.core.errors import NotFoundError
from lattice_server.core.model import Artifact
from lattice_server.engine.stores import store_folder
from lattice_server.engine.stores.artifact_store import HEAD, UPLOAD_BOUND, ArtifactStore
from lattice_server.engine.stores.spare_keeper import SPARES, SpareKeeper
from lattice_server.engine.stores.usage import Bound
from lattice_worker.runner.encoding import artifacts

TIMEOUT_S = 60.0
LARGE = 3 << 20


def play(
    scenario: Callable[[ArtifactStore], Coroutine[Any, Any, None]],
    spare_limit_bytes: int = 4 * LARGE,
    upload_ttl_s: float = TIMEOUT_S,
    upload_bound: Bound = UPLOAD_BOUND,
) -> None:
    """Play a scenario with a fresh store."""
    store = ArtifactStore(spare_limit_bytes=spare_limit_bytes, upload_ttl_s=upload_ttl_s, upload_bound=upload_bound)

    async def run() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await scenario(store)

    try:
        asyncio.run(run())
    finally:
        store.close()
    assert not store.directory.exists()


async def chunks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def read(store: ArtifactStore, artifact_id: str, offset: int = 0) -> bytes:
    return b"".join([chunk async for chunk in store.read(artifact_id, offset)])


async def is_there(store: ArtifactStore, artifact: Artifact) -> bool:
    try:
        await read(store, artifact.artifact_id)
    except NotFoundError:
        return False
    return True


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def spares(store: ArtifactStore) -> list[int]:
    """The sizes of the spares."""
    return sorted(path.stat().st_size for path in files(store.directory / SPARES))


def recycled(store: ArtifactStore, name: str, size: int) -> FileIO:
    """Return a file of the store to write to, as a task would."""
    return artifacts.create_artifact(str(store.directory / name), str(store.directory / SPARES), size)


def test_a_value_is_read_from_any_offset() -> None:
    data = bytes(range(256)) * 12_289

    async def scenario(store: ArtifactStore) -> None:
        artifact = await store.write(chunks(data[:5], b"", data[5:]))
        assert (artifact.size_bytes, artifact.node_id) == (len(data), HEAD)
        for offset in (0, 1, 5, 1 << 20, len(data) - 1, len(data), len(data) + 1):
            assert await read(store, artifact.artifact_id, offset) == data[offset:]

    play(scenario)


def test_it_is_read_piece_by_piece() -> None:
    async def scenario(store: ArtifactStore) -> None:
        artifact = await store.write(chunks(bytes(5 << 20)))
        sizes = [len(chunk) async for chunk in store.read(artifact.artifact_id, 0)]
        assert max(sizes) <= 1 << 20
        assert sum(sizes) == 5 << 20

    play(scenario)


@pytest.mark.parametrize("size", [1, LARGE])
@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", SPARES, "../secret", "{outside}/secret", "a/../../secret"),
        *("0" * 31, "0" * 33, "0" * 32 + "\n", "A" * 32),
    ],
)
def test_an_id_is_never_a_way_out_of_the_directory(
    name: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_folder, "SHARED_MEMORY", tmp_path)
    artifact_id = name.format(outside=tmp_path)

    async def scenario(store: ArtifactStore) -> None:
        (store.directory / "a").mkdir()
        path = store.directory / artifact_id
        if not path.is_dir():
            path.write_bytes(bytes(size))
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(NotFoundError) as caught:
            await read(store, artifact_id)
        assert caught.value.reason == "ARTIFACT_NOT_FOUND"
        # Workers choose their ids: an id of another form is referenced and released like any other.
        store.hold([Artifact(artifact_id, size, "n")])
        store.release([Artifact(artifact_id, size, "n")])
        assert sorted(tmp_path.rglob("*")) == before

    play(scenario)


def test_an_artifact_without_references_is_gone_and_may_be_released_again() -> None:
    async def scenario(store: ArtifactStore) -> None:
        artifact = await store.write(chunks(b"x"))
        other = await store.write(chunks(b"y"))
        store.hold([artifact, artifact])
        for _ in range(2):
            store.release([artifact])
            assert await is_there(store, artifact), "its writer holds it as well"
        store.release([artifact])
        assert not await is_there(store, artifact)
        store.release([artifact])
        assert await is_there(store, other)

    play(scenario)


def test_an_artifact_of_another_node_is_released_without_an_error() -> None:
    async def scenario(store: ArtifactStore) -> None:
        elsewhere, here = Artifact("0" * 32, 9, "n"), await store.write(chunks(b"x"))
        store.release([elsewhere])
        store.hold([elsewhere])
        store.release([elsewhere, here])
        assert not await is_there(store, here)

    play(scenario)


def test_an_upload_is_dropped_when_no_request_names_it_in_time() -> None:
    async def scenario(store: ArtifactStore) -> None:
        named = await store.write(chunks(b"x"))
        store.hold([named])
        unnamed = await store.write(chunks(b"y"))
        while await is_there(store, unnamed):
            await asyncio.sleep(0)
        assert await is_there(store, named), "its time was over before the other's"
        store.release([named])
        assert not await is_there(store, named)

    play(scenario, upload_ttl_s=0.0)


def test_a_large_file_is_reused_under_another_name() -> None:
    async def scenario(store: ArtifactStore) -> None:
        artifact = await store.write(chunks(b"x" * LARGE))
        small = await store.write(chunks(b"y"))
        store.release([artifact, small])
        assert not await is_there(store, artifact)
        assert files(store.directory) == files(store.directory / SPARES)
        assert spares(store) == [LARGE]
        with recycled(store, "1" * 32, LARGE - 1) as file:
            file.write(b"z" * (LARGE - 1))
            file.truncate(LARGE - 1)
        assert spares(store) == []
        assert await read(store, "1" * 32) == b"z" * (LARGE - 1)

    play(scenario)


def test_no_more_is_kept_to_be_written_again_than_the_limit() -> None:
    async def scenario(store: ArtifactStore) -> None:
        artifacts = [await store.write(chunks(bytes([number]) * LARGE)) for number in range(4)]
        store.release(artifacts)
        assert files(store.directory) == files(store.directory / SPARES)
        assert spares(store) == [LARGE, LARGE]

    play(scenario, spare_limit_bytes=3 * LARGE - 1)


def test_a_file_that_is_read_is_no_spare() -> None:
    async def scenario(store: ArtifactStore) -> None:
        artifact = await store.write(chunks(b"x" * LARGE))
        with (store.directory / artifact.artifact_id).open("rb") as file:
            store.release([artifact])
            assert files(store.directory) == []
            assert file.read() == b"x" * LARGE

    play(scenario)


def test_spares_are_deleted_when_nothing_was_dropped_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(store: ArtifactStore) -> None:
        for _ in range(2):
            store.release([await store.write(chunks(b"x" * LARGE))])
            assert spares(store) == [LARGE]
            async with asyncio.timeout(TIMEOUT_S):
                while spares(store):
                    await asyncio.sleep(0.01)

    monkeypatch.setattr(SpareKeeper.__init__, "__defaults__", (0.0,))
    play(scenario)


def test_a_file_is_dropped_although_a_worker_takes_a_spare_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    async def scenario(store: ArtifactStore) -> None:
        first, second = await store.write(chunks(b"x" * LARGE)), await store.write(chunks(b"y" * LARGE))
        store.release([first])

        def scan_and_take(folder: Path) -> Any:
            found = list(scan(folder))
            os.rename(found[0].path, store.directory / ("1" * 32))
            return found

        with monkeypatch.context() as patched:
            patched.setattr(os, "scandir", scan_and_take)
            store.release([second])
        assert not await is_there(store, second)
        assert [path.name for path in store.directory.iterdir() if path.is_file()] == ["1" * 32]

    play(scenario)


def test_a_reader_reads_to_the_end_when_its_file_is_dropped() -> None:
    async def scenario(store: ArtifactStore) -> None:
        artifact = await store.write(chunks(b"x" * LARGE))
        reader = store.read(artifact.artifact_id, 0)
        data = await anext(reader)
        store.release([artifact])
        with recycled(store, "1" * 32, LARGE) as file:
            file.write(b"z" * LARGE)
        data += b"".join([chunk async for chunk in reader])
        assert data == b"x" * LARGE

    play(scenario)


def test_equal_content_is_one_file_that_as_many_hold_as_uploaded_it() -> None:
    data = os.urandom(LARGE)

    async def scenario(store: ArtifactStore) -> None:
        together = await asyncio.gather(store.write(chunks(data)), store.write(chunks(data[:7], data[7:])))
        artifacts = [*together, await store.write(chunks(data))]
        assert {found.artifact_id for found in artifacts} == {hashlib.sha256(data).hexdigest()}
        assert len(files(store.directory)) == 1
        for artifact in artifacts:
            assert await read(store, artifact.artifact_id) == data
            store.release([artifact])
        assert not await is_there(store, artifacts[0])

    play(scenario)


def test_content_that_was_dropped_is_there_again_when_it_is_uploaded_again() -> None:
    data = os.urandom(LARGE)

    async def scenario(store: ArtifactStore) -> None:
        for _ in range(3):
            artifact = await store.write(chunks(data))
            assert await read(store, artifact.artifact_id) == data
            store.release([artifact])
            assert not await is_there(store, artifact)
        assert len(spares(store)) == 3, "each is a spare of its own, whoever takes which"

    play(scenario)


def test_an_upload_has_another_name_when_a_node_has_a_value_by_its_digest() -> None:
    async def scenario(store: ArtifactStore) -> None:
        claimed = Artifact(hashlib.sha256(b"x").hexdigest(), 1, "n")
        store.hold([claimed])
        artifact = await store.write(chunks(b"x"))
        assert artifact.artifact_id != claimed.artifact_id
        assert await read(store, artifact.artifact_id) == b"x"
        assert store.held(claimed.artifact_id) == claimed

    play(scenario)


def test_large_chunks_are_hashed_and_written_off_the_event_loop() -> None:
    threads: set[int] = set()

    async def scenario(store: ArtifactStore) -> None:
        append = store.files.append

        def watched(*given: Any) -> None:
            threads.add(threading.get_ident())
            append(*given)

        store.files.append = watched  # type: ignore[method-assign]
        await store.write(chunks(bytes(LARGE)))

    play(scenario)
    assert threads
    assert threading.get_ident() not in threads


def test_a_writer_that_breaks_off_leaves_nothing() -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"half"
        raise ConnectionError

    async def scenario(store: ArtifactStore) -> None:
        with pytest.raises(ConnectionError):
            await store.write(broken())
        assert files(store.directory) == []

    play(scenario)


def test_the_directory_is_accessible_to_its_user_only() -> None:
    async def scenario(store: ArtifactStore) -> None:
        assert store.directory.stat().st_mode & 0o077 == 0

    play(scenario)


def test_only_the_folders_of_killed_servers_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_folder, "SHARED_MEMORY", tmp_path)
    left = [tmp_path / name for name in ("lattice-head-left", "new-lattice-head-left")]
    new = tmp_path / "new-lattice-head-new"
    for directory in (*left, new):
        directory.mkdir()
        (directory / "large").write_bytes(b"x")
    os.utime(left[1], (0, 0))
    first = ArtifactStore()
    second = ArtifactStore()
    assert sorted(tmp_path.iterdir()) == sorted([new, first.directory, second.directory])
    for store in (first, second):
        store.close()


def test_an_upload_goes_with_the_run_that_took_it() -> None:
    async def scenario(store: ArtifactStore) -> None:
        first, second = await store.write(chunks(b"x")), await store.write(chunks(b"x"))
        assert first == second
        store.take([first, first])
        store.release([first, first])
        assert await is_there(store, second), "another run may take it"
        store.take([second])
        store.release([second])
        assert not await is_there(store, second)

    play(scenario)
