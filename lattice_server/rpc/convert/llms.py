"""Converts the definition of a model to that of a service. Rule: an engine is checked as its command is made."""

import secrets
from dataclasses import replace
from urllib.parse import urlsplit

from lattice.v1 import llm_pb2, service_pb2

from lattice_server.core.errors import invalid_field
from lattice_server.core.services.budgets import MINUTE_S, Limits
from lattice_server.core.services.engines import KEY_VARIABLE, OPENAI, TRANSFORMERS, VLLM, engine_of
from lattice_server.core.services.model import ServiceSpec
from lattice_server.rpc.convert.resources import resources_from_proto
from lattice_server.rpc.convert.services import NAME, spec_from_proto
from lattice_server.rpc.convert.times import limit_from_proto

START_TIMEOUT_S = 600
PROVIDER = "provider"
MAX_WINDOW_S = 3600
ENGINES = {
    llm_pb2.LLM_ENGINE_VLLM: VLLM,
    llm_pb2.LLM_ENGINE_TRANSFORMERS: TRANSFORMERS,
    llm_pb2.LLM_ENGINE_OPENAI: OPENAI,
}


def llm_from_proto(message: llm_pb2.LlmSpec) -> ServiceSpec:
    """Check and return the service of a model. Raises InvalidError."""
    if message.engine == llm_pb2.LLM_ENGINE_PROVIDER:
        return _provider(message)
    if (kind := ENGINES.get(message.engine)) is None:
        raise invalid_field("spec.engine", "name one: vllm, transformers, openai with a command, or provider")
    resources = resources_from_proto(message.resources, "spec.resources", is_async=False)
    try:
        engine = engine_of(kind, message.name, message.model, resources, message.command, message.arguments)
    except ValueError as error:
        raise invalid_field("spec.engine", str(error)) from error
    spec = service_pb2.ServiceSpec(
        name=message.name,
        command=service_pb2.ServiceCommand(arguments=engine.command),
        resources=message.resources,
        health=message.health,
        node_selector=message.node_selector,
        environment=message.environment,
    )
    set_fields = {field.name for field, _ in message.ListFields()}
    for name in set_fields & {"replicas", "max_replicas", "concurrency"}:
        setattr(spec, name, getattr(message, name))
    spec.health.http_path = message.health.http_path or message.health_path or engine.health_path
    for name in set_fields & {"idle_timeout", "start_timeout", "drain_timeout", "stop_grace"}:
        getattr(spec, name).CopyFrom(getattr(message, name))
    if not spec.HasField("concurrency") and engine.concurrency is not None:
        spec.concurrency = engine.concurrency
    if not spec.HasField("start_timeout"):
        spec.start_timeout.seconds = START_TIMEOUT_S
    found = spec_from_proto(spec)
    environment = {**engine.environment, **found.environment}
    budget = _budget(message)
    return replace(found, environment=environment, model=engine.served_model, engine=kind, budget=budget)


def _provider(message: llm_pb2.LlmSpec) -> ServiceSpec:
    """Return the service of a model outside of the cluster. Raises InvalidError."""
    if not NAME.fullmatch(message.name):
        raise invalid_field("spec.name", f"{message.name!r} is no name of a service")
    url = urlsplit(message.base_url)
    if url.scheme not in {"http", "https"} or not url.hostname or url.username or url.query or url.fragment:
        raise invalid_field("spec.base_url", "must be http:// or https://, a host and a path, without user and query")
    if message.command or message.arguments or message.environment:
        raise invalid_field("spec.command", "a provider runs no command here")
    key = message.api_key.plain or message.api_key.secret
    if not key.isprintable():
        raise invalid_field("spec.api_key", "must be one line of printable characters")
    return ServiceSpec(
        message.name,
        model=message.model or message.name,
        engine=PROVIDER,
        base_url=message.base_url.rstrip("/"),
        api_key=key,
        budget=_budget(message),
    )


def _budget(message: llm_pb2.LlmSpec) -> Limits | None:
    """Return the budget of a model; None without one. Raises InvalidError."""
    if not message.HasField("budget"):
        return None
    found, field = message.budget, "spec.budget"
    limits: dict[str, int] = {}
    for name in ("requests_per_minute", "tokens_per_minute", "concurrency"):
        if found.HasField(name):
            limits[name] = getattr(found, name)
            if limits[name] < 1:
                raise invalid_field(f"{field}.{name}", "must be at least 1")
    window_s = limit_from_proto(found, "window", f"{field}.window") or MINUTE_S
    if not 1 <= window_s <= MAX_WINDOW_S:
        raise invalid_field(f"{field}.window", f"must be from 1 s to {MAX_WINDOW_S} s")
    return Limits(**limits, window_s=window_s)


def with_key(spec: ServiceSpec, earlier: ServiceSpec | None) -> ServiceSpec:
    """Give vLLM a key that gateways know; that of an equal definition stays, so that it is equal."""
    if spec.engine != VLLM or KEY_VARIABLE in spec.environment:
        return spec
    known = "" if earlier is None else earlier.environment.get(KEY_VARIABLE, "")
    environment = {**spec.environment, KEY_VARIABLE: known or secrets.token_urlsafe(32)}
    return replace(spec, environment=environment, secrets=spec.secrets | {KEY_VARIABLE})
