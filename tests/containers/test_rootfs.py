"""The files of the sandbox image: which files of this machine it has, and which it leaves out."""

import io
import sys
import tarfile
from importlib.metadata import PackageNotFoundError

import pytest

from lattice_worker.containers.digest import source_digest
from lattice_worker.containers.rootfs import FOLDER, PYTHON, SITE, Rootfs, machine_digest, with_needed


@pytest.fixture(scope="module")
def members() -> dict[str, tarfile.TarInfo]:
    """The files of an image without further packages, by path."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        found = Rootfs(archive, "")
        found.write_machine(["orjson"])
        found.write_runner()
    data.seek(0)
    with tarfile.open(fileobj=data) as archive:
        return {f"/{member.name.lstrip('/')}": member for member in archive}


def test_image_has_python_the_runner_and_the_packages_that_were_chosen(members: dict[str, tarfile.TarInfo]) -> None:
    assert members[PYTHON].linkname == f"python3.{sys.version_info.minor}"
    assert {f"{FOLDER}/os.py", f"{SITE}/lattice_worker/runner/container.py", "/bin/sh"} <= members.keys()
    assert any(path.startswith(f"{SITE}/orjson/") for path in members)
    assert any(path.endswith("/libc.so.6") for path in members)
    assert f"{SITE}/lattice_worker/runner/__pycache__/frames.{sys.implementation.cache_tag}.pyc" in members


def test_image_has_nothing_else_of_this_machine(members: dict[str, tarfile.TarInfo]) -> None:
    assert not any(path.startswith(("/root", "/home", "/etc/shadow")) for path in members)
    assert not any(path.startswith((f"{SITE}/numpy", f"{FOLDER}/test/")) for path in members)


def test_files_of_the_image_are_read_only_and_give_no_rights(members: dict[str, tarfile.TarInfo]) -> None:
    files = [member for member in members.values() if member.isfile()]
    assert {member.mode for member in files} == {0o644, 0o755}
    assert {(member.uid, member.gid) for member in members.values()} == {(0, 0)}


def test_packages_bring_those_they_need() -> None:
    assert {"trustme", "cryptography", "cffi"} <= with_needed(["trustme"])
    with pytest.raises(PackageNotFoundError):
        with_needed(["no-such-package-of-lattice"])


def test_digest_changes_when_code_or_packages_change(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine_digest(["orjson"]) == machine_digest(["orjson"]) != machine_digest(["orjson", "numpy"])
    before = source_digest()
    monkeypatch.setattr(sys, "version", "3.99")
    assert source_digest() != before
