"""A server whose folder for large values is small or cannot be used, on a file system of its own."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from lattice.v1 import artifact_pb2, artifact_pb2_grpc

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="file systems are mounted")
CHUNK = b"x" * (1 << 20)


@contextmanager
def started(folder: Path, mount: str, filled_mib: int = 0) -> Iterator["subprocess.Popen[str]"]:
    """Run a server while the block runs that keeps large values in a folder on which no other process sees a mount.

    `filled_mib` of it are taken by another file."""
    store, settings = folder / "store", folder / "lattice.toml"
    store.mkdir()
    settings.write_text(f'store_folder = "{store}"\n')
    serve = f"{sys.executable} -m lattice_server start --head --executor local --num-cpus 0 --port 0"
    fill = f"head -c {filled_mib}M /dev/zero > {store}/filler" if filled_mib else "true"
    command = f"mount -t tmpfs -o {mount} none {store} && {fill} && exec {serve} --config {settings}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(["unshare", "-m", "sh", "-c", command], text=True, **pipes) as server:
        try:
            yield server
        finally:
            server.terminate()
            server.wait(30)


def test_an_upload_is_refused_with_folder_and_sizes_when_the_store_is_full(short_path: Path) -> None:
    with started(short_path, "size=8m", filled_mib=7) as server:
        assert server.stdout is not None
        found = re.search(r"127\.0\.0\.1:\d+", server.stdout.readline())
        assert found
        with grpc.insecure_channel(found.group()) as channel:
            artifacts = artifact_pb2_grpc.ArtifactServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                artifacts.WriteArtifact(artifact_pb2.WriteArtifactRequest(data=CHUNK) for _ in range(20))
            assert isinstance(caught.value, grpc.Call)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert re.search(
                rf"{short_path}/store/lattice-head-\w+ cannot take it: No space left on device; \d of 8 MiB are free",
                caught.value.details() or "",
            )
            written = artifacts.WriteArtifact(artifact_pb2.WriteArtifactRequest(data=b"x") for _ in range(9))
            assert written.artifact.size_bytes == 9


def test_a_folder_that_cannot_be_used_ends_the_start_with_one_line(short_path: Path) -> None:
    with started(short_path, "ro") as server:
        _, errors = server.communicate(timeout=30)
    assert server.returncode == 1
    assert errors.splitlines() == [
        f"Error: large values cannot be kept in {short_path}/store: Read-only file system; "
        "choose another `store_folder`"
    ]
