"""The capacity of a node: CPUs and memory within the limits of its container, and GPUs."""

import os
import sys
from types import SimpleNamespace

import psutil
import pytest

from lattice_worker.config import WorkerConfig
from lattice_worker.machine import cgroup, host

GIB = 2**30


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that knows two devices of 80 GiB."""
    known = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80 * GIB),
        nvmlDeviceGetName=lambda handle: "a model",
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}",
    )
    monkeypatch.setitem(sys.modules, "pynvml", known)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(("quota", "cpus"), [(None, 4.0), (1.5, 1.5), (0.25, 1.0), (64.0, 4.0)])
def test_capacity_has_the_cpus_of_the_container_when_they_are_fewer(
    quota: float | None, cpus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(cgroup, "limits", lambda: cgroup.Limits(quota, None))
    assert host.capacity(WorkerConfig("", "", "", "")).cpu == cpus
    assert host.capacity(WorkerConfig("", "", "", "", num_cpus=7)).cpu == 7


@pytest.mark.parametrize(("limit", "offers"), [(None, 16 * GIB), (2 * GIB, 2 * GIB), (2**63 - 4096, 16 * GIB)])
def test_capacity_has_the_memory_of_the_container_when_it_is_less(
    limit: int | None, offers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * GIB))
    monkeypatch.setattr(cgroup, "limits", lambda: cgroup.Limits(None, limit))
    assert host.capacity(WorkerConfig("", "", "", "")).memory_bytes == offers
    assert host.capacity(WorkerConfig("", "", "", "", memory_bytes=GIB)).memory_bytes == GIB


def offered(num_gpus: int | None = None) -> list[tuple[int, int]]:
    """Return the index and the memory in GiB of each device a worker offers."""
    config = WorkerConfig("", "", "", "", num_gpus=num_gpus, gpu_memory_bytes=8 * GIB)
    return [(gpu.index, gpu.memory_bytes // GIB) for gpu in host.capacity(config).gpus]


def test_devices_are_measured() -> None:
    assert offered() == [(0, 80), (1, 80)]
    assert offered(1) == [(0, 80)]


@pytest.mark.parametrize(("visible", "devices"), [("1", [1]), ("GPU-1, 0", [0, 1]), ("", []), ("-1", [])])
def test_devices_that_were_given_to_others_are_not_offered(
    visible: str, devices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [index for index, _ in offered()] == devices


def test_devices_that_cannot_be_measured_are_as_the_flags_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert offered(3) == [(1, 80), (0, 8), (2, 8)]
