"""Owns the calls of `LlmService`. Rule: a model is a service; its other calls are those of services."""

import builtins
import shlex
from collections.abc import Mapping, Sequence
from typing import TypedDict, Unpack
from uuid import uuid4

from lattice.v1 import llm_pb2, service_pb2

from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.environment import Secret
from lattice_client.runs.driver import blocking
from lattice_client.runs.tracebacks import shorten
from lattice_client.services.calls import AsyncServices
from lattice_client.services.spec import spec_of
from lattice_client.transport.requests import duration, made

ENGINES = {
    "vllm": llm_pb2.LLM_ENGINE_VLLM,
    "transformers": llm_pb2.LLM_ENGINE_TRANSFORMERS,
    "openai": llm_pb2.LLM_ENGINE_OPENAI,
    "provider": llm_pb2.LLM_ENGINE_PROVIDER,
}
MAX_WINDOW_S = 3600
# Fields of a service that a model has too, and that may be unset.
OPTIONAL = ("max_replicas", "concurrency", "idle_timeout", "start_timeout", "drain_timeout", "stop_grace")


class LlmSettings(TypedDict, total=False):
    """The settings of a model. Times are in seconds.

    Attributes:
        arguments: further arguments of the engine.
        base_url: the URL of a provider, which ends with the version of its API, such as `https://api.openai.com/v1`.
        api_key: the key of a provider, as `secret("NAME")`; gateways add it to requests, and no task has it.
        requests_per_minute, tokens_per_minute: how much of the model may be used, by all nodes together; requests
            beyond that wait.
        limit_window: the seconds over which the provider counts, by default 60: one that allows 10 requests a second
            has 600 a minute and a window of 1.
        concurrency: of a provider, how many requests there may be at once; else as in `ServiceSettings`.
        others: see `ServiceSettings`.
    """

    requests_per_minute: int | None
    tokens_per_minute: int | None
    limit_window: float | None

    arguments: Sequence[str]
    base_url: str
    api_key: Secret
    cpu: float | None
    gpu: float | None
    cpu_mem: float | None
    gpu_mem: float | None
    replicas: int
    max_replicas: int | None
    concurrency: int | None
    idle_timeout: float | None
    env: Mapping[str, str | Secret]
    node_selector: Mapping[str, str]
    start_timeout: float | None
    health: str
    health_interval: float | None
    health_timeout: float | None
    health_failures: int | None
    drain_timeout: float | None
    stop_grace: float | None


def _budget(name: str, settings: LlmSettings, *, is_provider: bool) -> service_pb2.LlmBudget | None:
    """Take the settings of a budget out; return it, or None without limits. Raises TaskDefinitionError."""
    limits = {"requests_per_minute": settings.pop("requests_per_minute", None)}
    limits["tokens_per_minute"] = settings.pop("tokens_per_minute", None)
    limits["concurrency"] = settings.pop("concurrency", None) if is_provider else None
    window_s = settings.pop("limit_window", None)
    given = {key: value for key, value in limits.items() if value is not None}
    for key, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise TaskDefinitionError(f"model {name!r}: {key} must be a whole number from 1, not {value!r}")
    if window_s is not None and (not given or isinstance(window_s, bool) or not 1 <= window_s <= MAX_WINDOW_S):
        text = f"limit_window must be seconds from 1 to {MAX_WINDOW_S}, beside a limit, not {window_s!r}"
        raise TaskDefinitionError(f"model {name!r}: {text}")
    if not given:
        return None
    return service_pb2.LlmBudget(**given, window=None if window_s is None else duration(window_s))


@shorten
class AsyncLlms(AsyncServices):
    """The language models of a server, as `AsyncLatticeClient.llm`; the other methods are those of services."""

    async def start(  # type: ignore[override]
        self,
        name: str,
        model: str = "",
        *,
        engine: str = "",
        command: str | Sequence[str] = (),
        wait: bool = True,
        timeout: float | None = None,
        **settings: Unpack[LlmSettings],
    ) -> service_pb2.Service:
        """Start a model, or give the model of this name another definition.

        Args:
            name: 1 to 63 lower-case letters, digits and hyphens; requests name it as their model.
            model: a name of a hub, or a folder on the nodes.
            engine: `vllm`, `transformers`, `openai` for a command, or `provider` for a model outside of the cluster; by
                default `openai` with a command, `provider` with a `base_url`, else `vllm`.
            command: a command that serves the API of OpenAI, in which `{host}`, `{port}` and `{model}` are replaced.
            wait: whether to wait until an instance is ready.
            timeout: seconds to wait at most.
            settings: see `LlmSettings`.

        Raises:
            TaskDefinitionError: a setting is wrong; nothing was sent.
            ServiceFailedError: the engine cannot start, or the first one has ended by itself; the error has its last
                lines. After the first end the server tries again, for which `LatticeClient.services.ready` waits.
            TimeoutError: no instance was ready in time; the engine continues to start.
            RequestError: the server refused it.
        """
        base_url, key = settings.pop("base_url", ""), settings.pop("api_key", None)
        chosen = engine or ("openai" if command else "provider" if base_url else "vllm")
        if chosen not in ENGINES:
            raise TaskDefinitionError(f"model {name!r}: engine must be one of {', '.join(ENGINES)}, not {engine!r}")
        budget = _budget(name, settings, is_provider=chosen == "provider")
        arguments = list(settings.pop("arguments", ()))
        program = shlex.split(command) if isinstance(command, str) else list(command)
        found, _ = spec_of(name, ["engine"], settings)
        spec = llm_pb2.LlmSpec(
            name=name,
            model=model,
            engine=ENGINES[chosen],
            command=program,
            arguments=arguments,
            resources=found.resources,
            replicas=found.replicas,
            **{field.name: value for field, value in found.ListFields() if field.name in OPTIONAL},
            environment=found.environment,
            node_selector=found.node_selector,
            health_path=found.health.http_path,
            health=found.health,
            base_url=base_url,
            budget=budget,
            api_key=None if key is None else service_pb2.EnvironmentValue(secret=key.value()),
        )
        request = made(llm_pb2.StartLlmRequest, spec=spec, request_id=uuid4().hex)
        return await self._start(self._rpc.llms.StartLlm, request, wait=wait, timeout=timeout)

    async def list(self) -> builtins.list[service_pb2.Service]:
        """Return the models, by name."""
        return [service for service in await super().list() if service.spec.engine]


class Llms:
    """The language models of a server, as `LatticeClient.llm`. `LatticeClient.services` has their other calls."""

    def __init__(self, twin: AsyncLlms) -> None:
        self._twin = twin

    def start(
        self,
        name: str,
        model: str = "",
        *,
        engine: str = "",
        command: str | Sequence[str] = (),
        wait: bool = True,
        timeout: float | None = None,
        **settings: Unpack[LlmSettings],
    ) -> service_pb2.Service:
        """Start a model, or give the model of this name another definition; see `AsyncLlms.start`."""
        call = self._twin.start(name, model, engine=engine, command=command, wait=wait, timeout=timeout, **settings)
        return blocking(call)

    def list(self) -> builtins.list[service_pb2.Service]:
        """Return the models, by name."""
        return blocking(self._twin.list())

    def stop(self, name: str, *, timeout: float | None = None) -> None:
        """Stop a model, and wait until none of its processes is left."""
        blocking(self._twin.stop(name, timeout=timeout))

    def scale(self, name: str, replicas: int | None = None, max_replicas: int | None = None) -> service_pb2.Service:
        """Change how many instances a model has."""
        return blocking(self._twin.scale(name, replicas, max_replicas))
