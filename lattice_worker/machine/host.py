"""Facts about this machine: capacity, addresses, and limits of processes."""

import contextlib
import ctypes
import itertools
import os
import platform
import resource
import socket

import psutil
from lattice.v1 import resources_pb2

from lattice_worker.config import WorkerConfig
from lattice_worker.machine import cgroup

PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37
MIN_SLOTS = 32
SLOTS_PER_CPU = 4
ASYNC_SLOTS = 4096


def capacity(config: WorkerConfig) -> resources_pb2.Capacity:
    """Return the resources that this node offers: as configured, or those of the machine within the container's limits.

    A container that has less than one CPU offers one, which tasks ask for by default.
    """
    limits = cgroup.limits()
    cpus, memory_bytes = float(len(os.sched_getaffinity(0))), psutil.virtual_memory().total
    cpus = min(cpus, max(1.0, limits.cpus or cpus))
    gpus = _gpus() if config.num_gpus is None else _named(config.num_gpus, config.gpu_memory_bytes or 0)
    cpus = cpus if config.num_cpus is None else config.num_cpus
    return resources_pb2.Capacity(
        cpu=cpus,
        memory_bytes=config.memory_bytes or min(memory_bytes, limits.memory_bytes or memory_bytes),
        gpus=gpus,
        slots=max(MIN_SLOTS, int(SLOTS_PER_CPU * cpus)),
        async_slots=ASYNC_SLOTS,
    )


_soft_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_descriptor_limit() -> None:
    """Let this process have as many descriptors as it may: it has several for each process of a task."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def descriptor_limit() -> int:
    """Return how many descriptors a process of this machine has unless it asks for more."""
    return _soft_limit


def adopt_orphans() -> None:
    """Have processes whose parents died become children of this one."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1)


def adopts_orphans() -> bool:
    """Whether processes whose parents died become children of this one."""
    found = ctypes.c_int(0)
    ctypes.CDLL(None, use_errno=True).prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(found))
    return bool(found.value)


def address_towards(target: str) -> str:
    """Return this machine's address on the route to `target`."""
    if target.startswith("unix:"):
        return "127.0.0.1"
    name, _, port = target.rpartition("://")[2].rpartition(":")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(name.strip("[]"), port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # Nothing is sent: connecting a datagram socket only looks up the route.
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def runtime() -> resources_pb2.Runtime:
    """Return the language and the version that run user code here."""
    return resources_pb2.Runtime(language="python", version=platform.python_version())


def _named(count: int, memory_bytes: int) -> list[resources_pb2.Gpu]:
    found = _gpus()[:count]
    unused = (i for i in itertools.count() if all(gpu.index != i for gpu in found))
    missing = itertools.islice(unused, count - len(found))
    return [*found, *(resources_pb2.Gpu(index=i, memory_bytes=memory_bytes) for i in missing)]


def _gpus() -> list[resources_pb2.Gpu]:
    try:
        import pynvml
    except ImportError:
        return []
    found = []
    with contextlib.suppress(pynvml.NVMLError):  # no driver: no GPU
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total
            model, uuid = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
            found.append(resources_pb2.Gpu(index=index, model=model, memory_bytes=memory, uuid=uuid))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    # The other devices were assigned to other processes.
    names = {name.strip() for name in visible.split(",")}
    return [gpu for gpu in found if not names.isdisjoint({str(gpu.index), gpu.uuid})]
