"""Owns the definition of a service in Python. Rule: a wrong setting raises before anything is sent."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from lattice.v1 import service_pb2, task_pb2

from lattice_client.code.function import pack
from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.environment import Secret
from lattice_client.graph.options import resources_of
from lattice_client.transport.requests import building, duration

REACHES = {"node": service_pb2.SERVICE_REACH_NODE, "cluster": service_pb2.SERVICE_REACH_CLUSTER}
MAX_S = 30 * 24 * 3600


class ServiceSettings(TypedDict, total=False):
    """The settings of a service. Times are in seconds.

    Attributes:
        cpu, gpu, cpu_mem, gpu_mem: the resources of one instance, as for `@task`; by default one CPU.
        replicas: how many instances there are at least; with zero there are none until the service is used.
        max_replicas: how many there are at most.
        concurrency: how many requests one instance serves; more instances are started beyond that.
        health: a path that has to answer by HTTP; by default the port has to accept connections.
        health_interval, health_timeout: the time between two checks, and how long an answer may take.
        health_failures: after how many failed checks in a row an instance gets no more requests.
        idle_timeout: without use for this long there are no instances.
        env: environment variables; a value is a text or `secret("NAME")`.
        node_selector: labels that the node must have.
        start_timeout: how long an instance may take to be ready.
        drain_timeout: how long an instance that is to be stopped may finish requests.
        stop_grace: the time between SIGTERM and SIGKILL.
        reach: `node`, or `cluster` for a service that listens on the address of its node.
        working_directory: the folder in which a command starts.
    """

    cpu: float | None
    gpu: float | None
    cpu_mem: float | None
    gpu_mem: float | None
    replicas: int
    max_replicas: int | None
    concurrency: int | None
    health: str
    health_interval: float | None
    health_timeout: float | None
    health_failures: int | None
    idle_timeout: float | None
    env: Mapping[str, str | Secret]
    node_selector: Mapping[str, str]
    start_timeout: float | None
    drain_timeout: float | None
    stop_grace: float | None
    reach: str
    working_directory: str


Program = str | Sequence[str] | Callable[..., Any]
DURATIONS = ("idle_timeout", "start_timeout", "drain_timeout", "stop_grace")
RESOURCES = ("cpu", "gpu", "cpu_mem", "gpu_mem")


def spec_of(
    name: str, program: Program, settings: Mapping[str, Any]
) -> tuple[service_pb2.ServiceSpec, task_pb2.CodeBundle | None]:
    """Return the definition of a service and the modules it needs. Raises TaskDefinitionError."""
    if unknown := [key for key in settings if key not in ServiceSettings.__annotations__]:
        known = ", ".join(ServiceSettings.__annotations__)
        raise TaskDefinitionError(f"a service has no setting {', '.join(map(repr, unknown))}; its settings: {known}")
    given = {key: value for key, value in settings.items() if value is not None}
    label = f"service {name!r}"
    try:
        with building():
            spec = _settings(name, label, given)
            bundle = _program(spec, program, label)
    except (TypeError, ValueError) as error:
        raise TaskDefinitionError(f"{label}: {error}") from error
    if folder := given.get("working_directory"):
        if not spec.HasField("command"):
            raise TaskDefinitionError(f"{label}: working_directory is for commands")
        spec.command.working_directory = folder
    return spec, bundle


def _settings(name: str, label: str, given: Mapping[str, Any]) -> service_pb2.ServiceSpec:
    reach = given.get("reach", "node")
    if reach not in REACHES:
        raise TaskDefinitionError(f"{label}: reach must be one of {', '.join(REACHES)}, not {reach!r}")
    spec = service_pb2.ServiceSpec(
        name=name,
        resources=resources_of(name, {key: given[key] for key in RESOURCES if key in given}, is_async=False),
        replicas=given.get("replicas", 1),
        max_replicas=given.get("max_replicas"),
        concurrency=given.get("concurrency"),
        node_selector=dict(given.get("node_selector", {})),
        reach=REACHES[reach],
        health=service_pb2.HealthCheck(http_path=given.get("health", ""), failures=given.get("health_failures")),
    )
    for key in DURATIONS:
        if key in given:
            getattr(spec, key).CopyFrom(_duration(label, key, given[key]))
    for key in ("interval", "timeout"):
        if (value := given.get(f"health_{key}")) is not None:
            getattr(spec.health, key).CopyFrom(_duration(label, f"health_{key}", value))
    for variable, value in given.get("env", {}).items():
        if isinstance(value, Secret):
            spec.environment[variable].secret = value.value()
        else:
            spec.environment[variable].plain = value
    return spec


def _duration(label: str, key: str, seconds: Any) -> Any:
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MAX_S:
        raise TaskDefinitionError(f"{label}: {key} must be seconds above 0 and at most {MAX_S}, not {seconds!r}")
    return duration(seconds)


def _program(spec: service_pb2.ServiceSpec, program: Program, label: str) -> task_pb2.CodeBundle | None:
    if isinstance(program, str):
        program = shlex.split(program)
    if not callable(program):
        spec.command.arguments.extend(program)
        return None
    packed = pack(program, label)
    spec.function.python.pickle = packed.pickle
    if packed.bundle is not None:
        spec.function.bundle_digest = packed.bundle.digest
    return packed.bundle
