"""Values for which a store in memory has no room: they lie on disk, and are deleted like all others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lattice_worker.store.artifact_staging import ArtifactStaging
from lattice_worker.store.local_store import LocalStore

ROOT = Path(__file__).resolve().parents[2]
FETCHES = """
import asyncio, os, sys
from pathlib import Path
from types import SimpleNamespace
from lattice.v1 import payload_pb2
from lattice_worker.store.artifact_staging import ArtifactStaging
from lattice_worker.store.local_store import LocalStore, MissingError

class Head:
    async def ReadArtifact(self, request):
        for _ in range(SIZE):
            yield SimpleNamespace(data=b"x" * (1 << 20))

async def fetch(store):
    staging = ArtifactStaging(store)
    with staging.opened():
        local_store = LocalStore(store, "n", staging, Head)
        artifact = payload_pb2.Artifact(artifact_id="0" * 32, size_bytes=SIZE << 20, node_id="head")
        try:
            await local_store._fetch(artifact)
        except MissingError as error:
            print(error)
            return
        with local_store.open(artifact.artifact_id) as file:
            print(len(file.read()), Path(store, artifact.artifact_id).is_symlink())
        local_store.drop([artifact.artifact_id])
        print(sorted(os.listdir(os.environ["DISK"])), [name for name in os.listdir(store) if name.startswith("0")])
"""

WRITES = """
import os
from pathlib import Path
from lattice_worker.runner.encoding.artifacts import Encoder, StoreFullError, open_artifact
from lattice_worker.runner.invocation.failures import failure_of

memory, disk = Path(os.environ["MEMORY"]), Path(os.environ["DISK"])
spare, made = memory / "spares" / "one", memory / "made"
made.mkdir()
spare.parent.mkdir()
spare.write_bytes(b"x" * (7 << 20))
encoder = Encoder({"folder": str(made), "store": str(memory), "inline_limit": 100})
first = made / encoder.encode(b"x" * (2 << 20), "out")["artifact"]
print(first.is_file() and not first.is_symlink(), spare.exists())
encoder.take_back()
try:
    large = made / encoder.encode(b"x" * (20 << 20), "out")["artifact"]
    print(len(open_artifact(str(large))), large.is_symlink())
except StoreFullError as error:
    failure = failure_of(error, encoder)
    print(failure["kind"] + ": " + failure["message"])
encoder.take_back()
print(os.listdir(disk), os.listdir(made))
"""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with a folder on disk."""
    made, disk = tmp_path / "store", tmp_path / "on-disk"
    made.mkdir()
    disk.mkdir()
    (made / "disk").symlink_to(disk)
    return made


def on_disk(store: Path) -> list[bytes]:
    """Return the artifacts on disk."""
    return [path.read_bytes() for path in (store / "disk").resolve().iterdir()]


def write(staging: ArtifactStaging, path: Path) -> None:
    """Write a value to disk, as a process does that finds the store full."""
    assert staging.on_disk(path)
    path.write_bytes(b"value")


def test_a_value_on_disk_is_published_read_and_dropped_like_one_in_memory(store: Path) -> None:
    staging = ArtifactStaging(str(store))
    with staging.opened():
        folder = staging.folder()
        write(staging, Path(folder, "a"))
        staging.publish(folder, ["a"])
        local_store = LocalStore(str(store), "n", staging, lambda: None)
        assert (store / "a").read_bytes() == b"value"
        staging.settle(["a"])
        assert local_store.stored() == ["a"]
        local_store.drop(["a"])
        assert not (store / "a").is_symlink()
        assert on_disk(store) == []


@pytest.mark.parametrize("how", ["delete", "discard"])
def test_a_value_on_disk_that_is_never_named_is_deleted(store: Path, how: str) -> None:
    staging = ArtifactStaging(str(store))
    with staging.opened():
        folder = staging.folder()
        write(staging, Path(folder, "a"))
        if how == "delete":
            staging.delete(folder, ["a"])
        else:
            staging.discard(folder)
        assert on_disk(store) == []


def test_values_on_disk_are_taken_over_when_a_killed_worker_had_reported_them(store: Path) -> None:
    killed = ArtifactStaging(str(store))
    opened = killed.opened()
    opened.__enter__()
    folder = killed.folder()
    for name in ("reported", "not-named"):
        write(killed, Path(folder, name))
    killed.publish(folder, ["reported"])
    killed.reported.discard("reported")
    killed.discard = lambda _: None  # type: ignore[method-assign]  # as a killed worker leaves it
    opened.__exit__(None, None, None)
    staging = ArtifactStaging(str(store))
    with staging.opened():
        assert staging.reported == {"reported"}
        assert on_disk(store) == [b"value"]


def test_bytes_outside_the_folder_on_disk_are_never_deleted(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"kept")
    (store / "a").symlink_to(other)
    LocalStore(str(store), "n", ArtifactStaging(str(store)), lambda: None).drop(["a", "disk"])
    assert other.read_bytes() == b"kept"
    assert not (store / "a").is_symlink()
    assert (store / "disk").is_dir()


def test_a_store_without_a_folder_on_disk_has_no_other_place(tmp_path: Path) -> None:
    assert not ArtifactStaging(str(tmp_path)).on_disk(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def run_in_small_memory(tmp_path: Path, script: str, *, has_disk: bool) -> list[str]:
    """Run a script that finds a file system of 8 MiB mounted at `memory`; return its output."""
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    link = f"ln -s {disk} {memory}/disk" if has_disk else ":"
    command = f"mount -t tmpfs -o size=8m none {memory} && {link} && exec {sys.executable} -c '{script}'"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command],
        check=False,
        cwd=ROOT,
        env={**os.environ, "MEMORY": str(memory), "DISK": str(disk)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(os.geteuid() != 0, reason="file systems are mounted")
@pytest.mark.parametrize("has_disk", [True, False])
def test_a_fetched_value_is_kept_on_disk_when_the_store_is_full(tmp_path: Path, has_disk: bool) -> None:
    script = f"SIZE = 20\n{FETCHES}\nimport lattice_worker.store.local_store as m\nm.RETRY_S = 0.01\n"
    script += 'asyncio.run(fetch(os.environ["MEMORY"]))'
    said = run_in_small_memory(tmp_path, script, has_disk=has_disk)
    if has_disk:
        assert said == [f"{20 << 20} True", "[] []"]
    else:
        assert f"it cannot be written to {tmp_path}/memory: No space left on device" in said[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="file systems are mounted")
@pytest.mark.parametrize("has_disk", [True, False])
def test_an_output_is_written_to_disk_when_the_store_is_full(tmp_path: Path, has_disk: bool) -> None:
    said = run_in_small_memory(tmp_path, WRITES, has_disk=has_disk)
    assert said[0] == "True False"  # it had room in place of a spare
    if has_disk:
        assert said[1:] == [f"{20 << 20} True", "[] []"]
    else:
        memory = tmp_path / "memory"
        assert said[1:] == [
            f"resources: there is no room for an output of {20 << 20} bytes: 8 of 8 MiB are free in {memory}",
            "[] []",
        ]


ROOM = """
import asyncio, os
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile
from lattice.v1 import task_pb2
from lattice_worker.store import local_store as module
from lattice_worker.runner.encoding.spare_files import SPARES
module.RETRY_S = 0.0
spare = Path(os.environ["MEMORY"], SPARES, "spare")
spare.parent.mkdir()
spare.write_bytes(b"x" * (7 << 20))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system is mounted")
@pytest.mark.parametrize("name", ["n", "head"])
def test_spares_make_room_for_a_value_of_another_node(name: str, tmp_path: Path) -> None:
    fetch = f"""
staging = ArtifactStaging(os.environ["MEMORY"])

async def main():
    with staging.opened():
        found = LocalStore(os.environ["MEMORY"], "{name}", staging, Head)
        artifact = payload_pb2.Artifact(artifact_id="0" * 32, size_bytes=SIZE << 20, node_id="other")
        await found._fetch(artifact)
        print(Path(os.environ["MEMORY"], "0" * 32).is_symlink(), spare.exists())

asyncio.run(main())
"""
    script = FETCHES.replace("SIZE", "2") + ROOM + fetch.replace("SIZE", "2")
    assert run_in_small_memory(tmp_path, script, has_disk=True) == ["False False"]


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system is mounted")
def test_spares_make_room_for_a_bundle(tmp_path: Path) -> None:
    script = """
from lattice_worker.store.bundles import Bundles

async def main():
    data = BytesIO()
    with ZipFile(data, "w") as archive:
        archive.writestr("module.py", "#" * (2 << 20))
    bundles = Bundles(os.environ["MEMORY"])
    bundles.learn([task_pb2.CodeBundle(digest="sha256:code", zip=data.getvalue())])
    await bundles.unpacking("sha256:code")
    print(Path(bundles.path("sha256:code"), "module.py").stat().st_size, spare.exists())
    bundles.close()

asyncio.run(main())
"""
    assert run_in_small_memory(tmp_path, ROOM + script, has_disk=False) == [f"{2 << 20} False"]
