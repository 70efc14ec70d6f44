"""Where large values are kept, and what becomes of an upload when there is no room; on file systems of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
IN_A_NAMESPACE = pytest.mark.skipif(os.geteuid() != 0, reason="file systems are mounted")
WRITES = """
import asyncio, sys
from lattice_server.core.errors import ExhaustedError
from lattice_server.engine.stores.store_folder import StoreError
from lattice_server.engine.stores.artifact_store import ArtifactStore

MIB = 1024 * 1024
store = None

def upload(size_mib, fill=b"x"):
    async def chunks():
        for _ in range(size_mib):
            yield fill * MIB

    async def write():
        return await store.write(chunks())

    try:
        return asyncio.run(write())
    except ExhaustedError as error:
        print(error.reason, error.message, error.metadata)

def start(folder=""):
    global store
    try:
        store = ArtifactStore(folder)
    except StoreError as error:
        print(error)
"""


def play(folder: Path, setup: str, script: str) -> list[str]:
    """Run a script with mounts that no other process sees; `$SHM` and `$DISK` are folders. Return its output."""
    (folder / "disk").mkdir(exist_ok=True)
    mounted = f"set -e; {setup}\nexec {sys.executable} -c '{WRITES}\n{script}'"
    env = {**os.environ, "SHM": "/dev/shm", "DISK": str(folder / "disk"), "TMPDIR": str(folder / "disk")}
    command = ["unshare", "-m", "sh", "-c", mounted]
    done = subprocess.run(command, check=False, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@IN_A_NAMESPACE
@pytest.mark.parametrize(
    ("setup", "is_on_disk"),
    [
        ("mount -t tmpfs -o size=512m none $SHM", False),
        ("mount -t tmpfs -o size=64m none $SHM", True),
        ("mount -t tmpfs -o size=300m none $SHM; head -c 100m /dev/zero > $SHM/full", True),
        ("mount -t tmpfs -o size=512m,ro none $SHM", True),
        ("mount -t tmpfs -o size=512m,nr_inodes=1 none $SHM", True),
        ("mount -t tmpfs none /dev", True),
    ],
)
def test_values_are_kept_on_disk_when_shared_memory_is_unusable(setup: str, is_on_disk: bool, short_path: Path) -> None:
    (line,) = play(short_path, setup, 'start(); print(store.directory); assert upload(1) and upload(70, b"y")')
    assert line.startswith(str(short_path / "disk") if is_on_disk else "/dev/shm/lattice-head-")


@IN_A_NAMESPACE
def test_an_upload_is_refused_with_folder_and_sizes_when_the_store_is_full(short_path: Path) -> None:
    setup = "mount -t tmpfs -o size=16m none $DISK"
    script = 'import os; start(os.environ["DISK"]); print(store.directory); upload(20); assert upload(10)'
    directory, refusal = play(short_path, setup, script)
    assert refusal.startswith(
        f"PAYLOAD_TOO_LARGE the store of large values in {directory} cannot take it: No space left on device; "
        "0 of 16 MiB are free there"
    )


@IN_A_NAMESPACE
def test_spares_make_room_for_an_upload(short_path: Path) -> None:
    setup = "mount -t tmpfs -o size=16m none $DISK"
    script = """
import os
start(os.environ["DISK"])
first = upload(3)

async def release():
    store.release([first])

asyncio.run(release())
print(len(os.listdir(store.directory / "spares")))
assert upload(14, b"y")
print(len(os.listdir(store.directory / "spares")))
""".replace("'", '"')
    assert play(short_path, setup, script) == ["1", "0"]


@IN_A_NAMESPACE
@pytest.mark.parametrize(
    ("setup", "folder", "why"),
    [
        ("mount -t tmpfs -o ro none $DISK", "$DISK", "Read-only file system; choose another `store_folder`"),
        (":", "$DISK/missing", "No such file or directory; choose another `store_folder`"),
        (":", "/proc/self/status", "Not a directory; choose another `store_folder`"),
        ("mkdir -p $DISK/" + "d" * 90, "$DISK/" + "d" * 90, "its path is too long for a socket; choose another"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_with_its_setting(
    setup: str, folder: str, why: str, short_path: Path
) -> None:
    folder = folder.replace("$DISK", str(short_path / "disk"))
    (line,) = play(short_path, setup, f'start("{folder}")')
    assert line.startswith(f"large values cannot be kept in {folder}: {why}")


@IN_A_NAMESPACE
def test_the_settings_are_named_when_no_folder_can_be_used(short_path: Path) -> None:
    # Directories for temporary files end with the current one.
    setup = "\n".join(f"mount -t tmpfs -o ro none {folder}" for folder in ("$SHM", "/var/tmp", "/tmp"))
    setup += "\nexport TMPDIR=/tmp PYTHONPATH=$PWD; cd /proc"
    (line,) = play(short_path, setup, "start()")
    assert line.startswith("there is no folder for large values: ")
    assert "TMPDIR" in line
    assert "store_folder" in line


@IN_A_NAMESPACE
def test_a_value_on_disk_is_read_and_dropped_like_one_in_memory(short_path: Path) -> None:
    script = """
from pathlib import Path
from lattice_server.core.model import Artifact
start()
disk = (store.directory / "disk").resolve()
print(disk.parent, disk.name.startswith("lattice-head-"))
path = store.directory / ("1" * 32)
path.symlink_to(disk / "bytes")
path.write_bytes(b"x" * (2 * MIB))
artifact = Artifact("1" * 32, 2 * MIB, "head")

async def read():
    return sum([len(chunk) async for chunk in store.read(artifact.artifact_id, 0)])

print(asyncio.run(read()) == 2 * MIB)
store.settle([artifact])
print(path.is_symlink(), list(disk.iterdir()), list((store.directory / "spares").iterdir()))
store.close()
print(disk.exists(), store.directory.exists())
"""
    lines = play(short_path, "mount -t tmpfs -o size=512m none $SHM", script)
    assert lines == [f"{short_path / 'disk'} True", "True", "False [] []", "False False"]
