"""The checks of a machine as a worker."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from lattice_worker import doctor
from lattice_worker.machine import cgroup
from lattice_worker.sandbox.policy import LEVELS


class Usage(NamedTuple):
    """What `shutil.disk_usage` returns."""

    total: int
    used: int
    free: int


@pytest.mark.parametrize(("free_bytes", "status"), [(2**40, "ok"), (2**29, "warning"), (2**20, "error")])
def test_disk_is_judged_by_its_free_space(monkeypatch: pytest.MonkeyPatch, free_bytes: int, status: str) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(0, 0, free_bytes))
    found = doctor._disk(Path("/somewhere"))
    assert (found.status, bool(found.advice)) == (status, status != "ok")


@pytest.mark.parametrize(("free_bytes", "status"), [(2**30, "ok"), (2**20, "warning")])
def test_shared_memory_is_judged_by_its_free_space(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_bytes: int, status: str
) -> None:
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(0, 0, free_bytes))
    assert [found.status for found in doctor._store()] == [status]
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path / "none")
    assert [found.status for found in doctor._store()] == ["warning"]


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (cgroup.Limits(None, None), "no limit of CPUs or memory"),
        (cgroup.Limits(None, 2**63 - 4096), "no limit of CPUs or memory"),
        (cgroup.Limits(1.5, 2**31), "the container limits this process to 1.5 CPUs and 2.0 GiB of memory"),
    ],
)
def test_cgroup_limits_are_named(monkeypatch: pytest.MonkeyPatch, limits: cgroup.Limits, text: str) -> None:
    monkeypatch.setattr(cgroup, "limits", lambda: limits)
    assert doctor._cgroup().found == text


def checks(**environment: str) -> dict[str, dict[str, str]]:
    command = [sys.executable, "-m", "lattice_worker.doctor"]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    return {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
def test_each_level_of_isolation_is_tried_and_leaves_nothing_behind(tmp_path: Path) -> None:
    found = checks(TMPDIR=str(tmp_path))
    assert {f"isolation {level}" for level in LEVELS} < found.keys()
    assert {check["status"] for check in found.values()} <= {"ok", "warning"}
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="the level can be set up everywhere as root only")
def test_a_level_whose_seal_fails_is_named_with_the_reason() -> None:
    found = checks(LATTICE_TEST_BREAK="net")["isolation seccomp"]
    assert found["status"] == "warning"
    assert "not offered here: missing: " in found["found"]
    assert "a net namespace" in found["found"]
    assert found["advice"]
