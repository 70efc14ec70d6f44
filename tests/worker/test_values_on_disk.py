"""Values for which a store in memory has no room: they lie on disk, and are deleted like all others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lattice_worker.drafts import Drafts
from lattice_worker.materials import Materials

ROOT = Path(__file__).resolve().parents[2]
FETCHES = """
import asyncio, os, sys
from pathlib import Path
from types import SimpleNamespace
from lattice.v1 import payload_pb2
from lattice_worker.drafts import Drafts
from lattice_worker.materials import Materials, MissingError

class Head:
    async def ReadArtifact(self, request):
        for _ in range(SIZE):
            yield SimpleNamespace(data=b"x" * (1 << 20))

async def fetch(store):
    drafts = Drafts(store)
    with drafts.opened():
        materials = Materials(store, "n", drafts, Head)
        artifact = payload_pb2.Artifact(artifact_id="0" * 32, size_bytes=SIZE << 20, node_id="head")
        try:
            await materials._fetch(artifact)
        except MissingError as error:
            print(error)
            return
        with materials.open(artifact.artifact_id) as file:
            print(len(file.read()), Path(store, artifact.artifact_id).is_symlink())
        materials.drop([artifact.artifact_id])
        print(sorted(os.listdir(os.environ["DISK"])), [name for name in os.listdir(store) if name.startswith("0")])
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
    """Return what lies on disk."""
    return [path.read_bytes() for path in (store / "disk").resolve().iterdir()]


def write(drafts: Drafts, path: Path) -> None:
    """Write a value to disk, as a process does that finds the store full."""
    assert drafts.on_disk(path)
    path.write_bytes(b"value")


def test_a_value_on_disk_is_published_read_and_dropped_like_one_in_memory(store: Path) -> None:
    drafts = Drafts(str(store))
    with drafts.opened():
        folder = drafts.folder()
        write(drafts, Path(folder, "a"))
        drafts.publish(folder, ["a"])
        materials = Materials(str(store), "n", drafts, lambda: None)
        assert (store / "a").read_bytes() == b"value"
        drafts.settle(["a"])
        assert materials.stored() == ["a"]
        materials.drop(["a"])
        assert not (store / "a").is_symlink()
        assert on_disk(store) == []


@pytest.mark.parametrize("how", ["delete", "discard"])
def test_a_value_on_disk_that_is_never_named_is_deleted(store: Path, how: str) -> None:
    drafts = Drafts(str(store))
    with drafts.opened():
        folder = drafts.folder()
        write(drafts, Path(folder, "a"))
        if how == "delete":
            drafts.delete(folder, ["a"])
        else:
            drafts.discard(folder)
        assert on_disk(store) == []


def test_values_on_disk_of_a_killed_worker_are_taken_over_when_reported_and_deleted_otherwise(store: Path) -> None:
    killed = Drafts(str(store))
    opened = killed.opened()
    opened.__enter__()
    folder = killed.folder()
    for name in ("reported", "not-named"):
        write(killed, Path(folder, name))
    killed.publish(folder, ["reported"])
    killed.reported.discard("reported")
    killed.discard = lambda _: None  # type: ignore[method-assign]  # what a killed worker leaves
    opened.__exit__(None, None, None)
    drafts = Drafts(str(store))
    with drafts.opened():
        assert drafts.reported == {"reported"}
        assert on_disk(store) == [b"value"]


def test_bytes_outside_the_folder_on_disk_are_never_deleted(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"kept")
    (store / "a").symlink_to(other)
    Materials(str(store), "n", Drafts(str(store)), lambda: None).drop(["a", "disk"])
    assert other.read_bytes() == b"kept"
    assert not (store / "a").is_symlink()
    assert (store / "disk").is_dir()


def test_a_store_without_a_folder_on_disk_has_no_other_place(tmp_path: Path) -> None:
    assert not Drafts(str(tmp_path)).on_disk(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="file systems are mounted")
@pytest.mark.parametrize("has_disk", [True, False])
def test_a_fetched_value_is_kept_on_disk_when_the_store_is_full(tmp_path: Path, has_disk: bool) -> None:
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    link = f"ln -s {disk} {memory}/disk" if has_disk else ":"
    script = f"SIZE = 20\n{FETCHES}\nimport lattice_worker.materials as m\nm.RETRY_S = 0.01\n"
    script += f'asyncio.run(fetch("{memory}"))'
    command = f"mount -t tmpfs -o size=8m none {memory} && {link} && exec {sys.executable} -c '{script}'"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command],
        check=False,
        cwd=ROOT,
        env={**os.environ, "DISK": str(disk)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    if has_disk:
        assert done.stdout.splitlines() == [f"{20 << 20} True", "[] []"]
    else:
        assert f"it cannot be written to {memory}: No space left on device" in done.stdout
