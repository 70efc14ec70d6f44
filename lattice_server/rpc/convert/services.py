"""Converts services and their parts. Rule: a definition is checked here, and a secret is never converted back."""

import re
import time
from collections.abc import Mapping

from lattice.v1 import service_pb2, task_pb2

from lattice_server.core.errors import invalid_field
from lattice_server.core.model import Bundle, Function
from lattice_server.core.services.budgets import Use
from lattice_server.core.services.instances import Instance
from lattice_server.core.services.model import (
    FailureKind,
    HealthCheck,
    InstanceState,
    Reach,
    ServiceFailure,
    ServiceSpec,
    ServiceState,
)
from lattice_server.core.tenancy import id_of
from lattice_server.engine.services.entry import ServiceEntry
from lattice_server.engine.services.log import LogLine
from lattice_server.rpc.convert.environment import check_size, check_variable
from lattice_server.rpc.convert.functions import function_from_proto
from lattice_server.rpc.convert.resources import resources_from_proto, resources_to_proto
from lattice_server.rpc.convert.times import duration, fill_timestamp, limit_from_proto, timestamp

NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
MAX_REPLICAS = 1000
MAX_ARGUMENTS, MAX_ARGUMENT_BYTES = 1000, 64 * 1024
MAX_FUNCTION_BYTES = 256 * 1024
# Of a service that has no instances until it is used, when its caller names no time.
DEFAULT_IDLE_S = 300.0
REACH_FROM_PROTO = {
    service_pb2.SERVICE_REACH_UNSPECIFIED: Reach.NODE,
    service_pb2.SERVICE_REACH_NODE: Reach.NODE,
    service_pb2.SERVICE_REACH_CLUSTER: Reach.CLUSTER,
}
REACH_TO_PROTO = {Reach.NODE: service_pb2.SERVICE_REACH_NODE, Reach.CLUSTER: service_pb2.SERVICE_REACH_CLUSTER}
STATE_TO_PROTO = {state: service_pb2.ServiceState.Value(f"SERVICE_STATE_{state.name}") for state in ServiceState}
INSTANCE_TO_PROTO = {state: service_pb2.InstanceState.Value(f"INSTANCE_STATE_{state.name}") for state in InstanceState}
FAILURE_TO_PROTO = {
    kind: service_pb2.ServiceFailureKind.Value(f"SERVICE_FAILURE_KIND_{kind.name}") for kind in FailureKind
}


def function_of_worker(entrypoint: str) -> Function:
    """Return a function that workers have, which is called in a process of its own."""
    message = task_pb2.Function(entrypoint=entrypoint, display_name=entrypoint.rpartition(".")[2])
    message.python.call_style = task_pb2.CALL_STYLE_KEYWORDS
    message.python.return_style = task_pb2.RETURN_STYLE_VALUE
    message.python.concurrency = task_pb2.CONCURRENCY_FRESH_PROCESS

    def no_bundle(digest: str) -> Bundle:
        raise AssertionError(f"it has no bundle {digest}")

    return function_from_proto(message, no_bundle)


def spec_from_proto(message: service_pb2.ServiceSpec, field: str = "spec") -> ServiceSpec:
    """Check and return a definition. Raises InvalidError."""
    if not NAME.fullmatch(message.name):
        text = "must have 1 to 63 lower-case letters, digits and hyphens, beginning with a letter"
        raise invalid_field(f"{field}.name", f"{message.name!r}: {text}")
    environment, secrets = _environment(message.environment, f"{field}.environment")
    replicas = message.replicas if message.HasField("replicas") else 1
    most = message.max_replicas if message.HasField("max_replicas") else max(1, replicas)
    check_replicas(replicas, most, field)
    concurrency = message.concurrency if message.HasField("concurrency") else None
    if concurrency is not None and concurrency < 1:
        raise invalid_field(f"{field}.concurrency", "must be at least 1; leave it out for no limit")
    if (reach := REACH_FROM_PROTO.get(message.reach)) is None:
        raise invalid_field(f"{field}.reach", f"there is no reach {message.reach}")
    idle_s = limit_from_proto(message, "idle_timeout", f"{field}.idle_timeout")
    pickle, entrypoint, bundle = _function(message, f"{field}.function")
    return ServiceSpec(
        name=message.name,
        command=_command(message, f"{field}.command"),
        working_directory=message.command.working_directory,
        function=pickle,
        entrypoint=entrypoint,
        bundle=bundle,
        resources=resources_from_proto(message.resources, f"{field}.resources", is_async=False),
        replicas=replicas,
        max_replicas=most,
        health=_health(message.health, f"{field}.health"),
        idle_timeout_s=DEFAULT_IDLE_S if idle_s is None and not replicas else idle_s,
        environment=environment,
        secrets=secrets,
        node_selector=tuple(sorted(message.node_selector.items())),
        concurrency=concurrency,
        start_timeout_s=limit_from_proto(message, "start_timeout", f"{field}.start_timeout") or 60.0,
        drain_timeout_s=limit_from_proto(message, "drain_timeout", f"{field}.drain_timeout") or 30.0,
        stop_grace_s=limit_from_proto(message, "stop_grace", f"{field}.stop_grace") or 10.0,
        reach=reach,
        model=message.model,
        engine=message.engine,
    )


def check_replicas(replicas: int, most: int, field: str) -> None:
    """Raise InvalidError when a service cannot have so many instances."""
    if not 0 <= replicas <= MAX_REPLICAS:
        raise invalid_field(f"{field}.replicas", f"must be from 0 to {MAX_REPLICAS}")
    if not max(1, replicas) <= most <= MAX_REPLICAS:
        raise invalid_field(f"{field}.max_replicas", f"must be from {max(1, replicas)} to {MAX_REPLICAS}")


def _command(message: service_pb2.ServiceSpec, field: str) -> tuple[str, ...]:
    program = message.WhichOneof("program")
    if program is None:
        raise invalid_field(field, "a service needs a command or a function")
    arguments = tuple(message.command.arguments)
    if program == "command" and (not arguments or not arguments[0]):
        raise invalid_field(f"{field}.arguments", "must name a program")
    if len(arguments) > MAX_ARGUMENTS or sum(len(part.encode()) for part in arguments) > MAX_ARGUMENT_BYTES:
        raise invalid_field(f"{field}.arguments", f"has over {MAX_ARGUMENTS} entries or {MAX_ARGUMENT_BYTES} bytes")
    if any("\0" in part for part in (*arguments, message.command.working_directory)):
        raise invalid_field(f"{field}.arguments", "must not contain a zero byte")
    return arguments


def _function(message: service_pb2.ServiceSpec, field: str) -> tuple[bytes, str, str]:
    function = message.function
    if message.WhichOneof("program") != "function":
        return b"", "", ""
    if bool(function.python.pickle) == bool(function.entrypoint):
        raise invalid_field(field, "a service has either python.pickle or an entrypoint")
    if function.entrypoint and ":" not in function.entrypoint:
        raise invalid_field(f"{field}.entrypoint", "must be package.module:name")
    if len(function.python.pickle) > MAX_FUNCTION_BYTES:
        size = len(function.python.pickle)
        text = f"its pickle has {size} bytes and may have {MAX_FUNCTION_BYTES}: have the function load its data"
        raise invalid_field(field, text)
    return function.python.pickle, function.entrypoint, function.bundle_digest


def _environment(
    messages: Mapping[str, service_pb2.EnvironmentValue], field: str
) -> tuple[dict[str, str], frozenset[str]]:
    found, secrets = {}, set()
    for name, value in messages.items():
        which = value.WhichOneof("source")
        check_variable(name, None if which is None else value.plain or value.secret, field)
        found[name] = value.plain or value.secret
        if which == "secret":
            secrets.add(name)
    check_size(found, field)
    return found, frozenset(secrets)


def _health(message: service_pb2.HealthCheck, field: str) -> HealthCheck:
    path = message.http_path
    if path and (not path.startswith("/") or not path.isprintable() or " " in path):
        raise invalid_field(f"{field}.http_path", "must begin with / and have no spaces")
    failures = message.failures if message.HasField("failures") else 3
    if not 1 <= failures <= 1000:
        raise invalid_field(f"{field}.failures", "must be from 1 to 1000")
    interval_s = limit_from_proto(message, "interval", f"{field}.interval") or 10.0
    return HealthCheck(path, interval_s, limit_from_proto(message, "timeout", f"{field}.timeout") or 10.0, failures)


def service_to_proto(entry: ServiceEntry) -> service_pb2.Service:
    """Return a service as it is now."""
    machine = entry.machine
    instances = list(machine.instances.values())
    if machine.last_ended is not None:
        instances.append(machine.last_ended)
    found = service_pb2.Service(
        spec=_spec_to_proto(machine.spec),
        revision=machine.revision,
        state=STATE_TO_PROTO[machine.state],
        instances=[_instance_to_proto(entry, instance) for instance in instances],
        wanted=machine.wanted,
        restarts=machine.restarts,
        waiting=machine.demand.waiting,
        users=machine.demand.users,
    )
    if (failure := machine.starts.given_up or machine.starts.last) is not None:
        found.failure.CopyFrom(failure_to_proto(failure))
    if entry.budget is not None:
        _fill_use(found.budget_use, entry.budget.use(time.monotonic()), time.time())
    if machine.starts.not_before is not None:
        fill_timestamp(found.next_start_time, machine.starts.not_before + entry.offset_s)
    return found


def _fill_use(message: service_pb2.LlmBudgetUse, use: Use, now_s: float) -> None:
    message.requests, message.tokens, message.open = use.requests, use.tokens, use.open
    message.waiting, message.permitted, message.refused = use.waiting, use.permitted, use.refused
    if use.blocked_s > 0:
        fill_timestamp(message.blocked_until, now_s + use.blocked_s)


def _instance_to_proto(entry: ServiceEntry, instance: Instance) -> service_pb2.ServiceInstance:
    run = entry.runs.get(instance.instance_id)
    return service_pb2.ServiceInstance(
        instance_id=instance.instance_id,
        state=INSTANCE_TO_PROTO[instance.state],
        node_id=instance.node_id,
        endpoint=instance.endpoint,
        in_flight=instance.in_flight,
        state_time=timestamp(instance.since + entry.offset_s),
        run_id="" if run is None else id_of(run.entry.key),
        failure=None if instance.failure is None else failure_to_proto(instance.failure),
        detail=instance.detail,
        revision=instance.revision,
    )


def failure_to_proto(failure: ServiceFailure) -> service_pb2.ServiceFailure:
    """Return the message of a failure."""
    return service_pb2.ServiceFailure(
        kind=FAILURE_TO_PROTO[failure.kind],
        message=failure.message,
        exit_status=failure.exit_status,
        signal=failure.signal,
        last_lines=failure.last_lines,
    )


def _spec_to_proto(spec: ServiceSpec) -> service_pb2.ServiceSpec:
    """Return a definition without its secrets and without its code."""
    health = spec.health
    found = service_pb2.ServiceSpec(
        name=spec.name,
        resources=resources_to_proto(spec.resources),
        replicas=spec.replicas,
        max_replicas=spec.max_replicas,
        health=service_pb2.HealthCheck(
            http_path=health.http_path,
            interval=duration(health.interval_s),
            timeout=duration(health.timeout_s),
            failures=health.failures,
        ),
        idle_timeout=None if spec.idle_timeout_s is None else duration(spec.idle_timeout_s),
        node_selector=dict(spec.node_selector),
        concurrency=spec.concurrency,
        start_timeout=duration(spec.start_timeout_s),
        drain_timeout=duration(spec.drain_timeout_s),
        stop_grace=duration(spec.stop_grace_s),
        reach=REACH_TO_PROTO[spec.reach],
        model=spec.model,
        engine=spec.engine,
        base_url=spec.base_url,
    )
    if (limits := spec.budget) is not None:
        found.budget.CopyFrom(
            service_pb2.LlmBudget(
                requests_per_minute=limits.requests_per_minute,
                tokens_per_minute=limits.tokens_per_minute,
                concurrency=limits.concurrency,
                window=duration(limits.window_s),
            )
        )
    if spec.base_url:
        return found
    if spec.command:
        found.command.arguments.extend(spec.command)
        found.command.working_directory = spec.working_directory
    else:
        found.function.entrypoint, found.function.bundle_digest = spec.entrypoint, spec.bundle
    for name, value in spec.environment.items():
        if name in spec.secrets:
            found.environment[name].secret = ""
        else:
            found.environment[name].plain = value
    return found


def line_to_proto(line: LogLine) -> service_pb2.ServiceLogLine:
    """Return the message of a line."""
    return service_pb2.ServiceLogLine(
        number=line.number, instance_id=line.instance_id, time=timestamp(line.time_s), text=line.text
    )
