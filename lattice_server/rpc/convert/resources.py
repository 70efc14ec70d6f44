"""Converts resources, capacities, runtimes and isolation levels. Rule: unset resources get the server's defaults."""

from lattice.v1 import resources_pb2

from lattice_server.core.errors import invalid_field
from lattice_server.core.model import Capacity, Gpu, Isolation, Resources
from lattice_server.core.runtime import Runtime

ISOLATION_FROM_PROTO = {
    resources_pb2.ISOLATION_UNSPECIFIED: Isolation.NONE,
    resources_pb2.ISOLATION_NONE: Isolation.NONE,
    resources_pb2.ISOLATION_SUBPROCESS: Isolation.SUBPROCESS,
    resources_pb2.ISOLATION_SECCOMP: Isolation.SECCOMP,
    resources_pb2.ISOLATION_DOCKER: Isolation.DOCKER,
}
ISOLATION_TO_PROTO = {
    core: proto for proto, core in ISOLATION_FROM_PROTO.items() if proto != resources_pb2.ISOLATION_UNSPECIFIED
}
MEMORY_ENFORCEMENT: dict[bool | None, resources_pb2.MemoryEnforcement.ValueType] = {
    None: resources_pb2.MEMORY_ENFORCEMENT_UNSPECIFIED,
    False: resources_pb2.MEMORY_ENFORCEMENT_MEASURED,
    True: resources_pb2.MEMORY_ENFORCEMENT_CGROUP,
}
LIMITS_BY_CGROUP = {number: is_so for is_so, number in MEMORY_ENFORCEMENT.items()}
# By the names of resources in the scheduler's reasons to wait.
RESOURCE_KIND_TO_PROTO = {
    "cpu": resources_pb2.RESOURCE_KIND_CPU,
    "memory": resources_pb2.RESOURCE_KIND_MEMORY,
    "gpu": resources_pb2.RESOURCE_KIND_GPU,
    "gpu_memory": resources_pb2.RESOURCE_KIND_GPU_MEMORY,
}


def isolation_from_proto(value: "resources_pb2.Isolation.ValueType", least: Isolation, field: str) -> Isolation:
    """Return a level of isolation, by default the least one. Raises InvalidError for a weaker one."""
    if value == resources_pb2.ISOLATION_UNSPECIFIED:
        return least
    found = ISOLATION_FROM_PROTO.get(value)
    if found is None:
        raise invalid_field(field, "this server does not know this isolation")
    levels = tuple(Isolation)  # From the weakest to the strictest.
    if levels.index(found) < levels.index(least):
        raise invalid_field(field, f"this server runs tasks at isolation {least.value} at least")
    return found


def resources_from_proto(message: resources_pb2.Resources, field: str, *, is_async: bool) -> Resources:
    """Return resources with defaults filled in. Raises InvalidError."""
    cpu = message.cpu if message.HasField("cpu") else (0.0 if is_async else 1.0)
    resources = Resources(cpu, message.memory_bytes, message.gpu, message.gpu_memory_bytes)
    if not (0 <= resources.cpu < 1e6 and 0 <= resources.gpu < 1e6):
        raise invalid_field(field, "cpu and gpu must be numbers from 0 and below 1000000")
    if resources.memory_bytes < 0 or resources.gpu_memory_bytes < 0:
        raise invalid_field(field, "memory must not be negative")
    if resources.gpu > 1 and resources.gpu != int(resources.gpu):
        raise invalid_field(f"{field}.gpu", "more than one GPU must be a whole number")
    return resources


def resources_to_proto(resources: Resources) -> resources_pb2.Resources:
    """Return the message of resources."""
    return resources_pb2.Resources(
        cpu=resources.cpu,
        memory_bytes=resources.memory_bytes,
        gpu=resources.gpu,
        gpu_memory_bytes=resources.gpu_memory_bytes,
    )


def runtime_from_proto(message: resources_pb2.Runtime) -> Runtime:
    """Return a runtime."""
    return Runtime(message.language, message.version)


def runtime_to_proto(runtime: Runtime) -> resources_pb2.Runtime:
    """Return the message of a runtime."""
    return resources_pb2.Runtime(language=runtime.language, version=runtime.version)


def capacity_from_proto(message: resources_pb2.Capacity) -> Capacity:
    """Return the capacity that a worker offers."""
    gpus = tuple(Gpu(gpu.index, gpu.model, gpu.memory_bytes, gpu.uuid) for gpu in message.gpus)
    return Capacity(message.cpu, message.memory_bytes, gpus, message.slots, message.async_slots)


def capacity_to_proto(capacity: Capacity) -> resources_pb2.Capacity:
    """Return the message of a capacity."""
    gpus = [
        resources_pb2.Gpu(index=g.index, model=g.model, memory_bytes=g.memory_bytes, uuid=g.uuid) for g in capacity.gpus
    ]
    return resources_pb2.Capacity(
        cpu=capacity.cpu,
        memory_bytes=capacity.memory_bytes,
        gpus=gpus,
        slots=capacity.slots,
        async_slots=capacity.async_slots,
    )
