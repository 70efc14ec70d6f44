"""Owns the command lines of engines for language models. Rule: pure; keys and secrets are never arguments.

Arguments of a process are readable by every user of its machine.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import field

from lattice_server.core.frozen import frozen
from lattice_server.core.model import Resources

VLLM, TRANSFORMERS, OPENAI = "vllm", "transformers", "openai"
# The variable by which vLLM takes its key.
KEY_VARIABLE = "VLLM_API_KEY"


@frozen
class Engine:
    """How an engine is started and checked. `concurrency` is how many requests it serves at once; None for many."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    health_path: str = "/health"
    concurrency: int | None = None
    served_model: str = ""


def engine_of(
    kind: str,
    name: str,
    model: str,
    resources: Resources,
    command: Sequence[str] = (),
    arguments: Sequence[str] = (),
) -> Engine:
    """Return the engine of a model that requests call `name`. Raises ValueError with a sentence."""
    if kind == OPENAI:
        if not command:
            raise ValueError("the engine openai needs the command of a server")
        return Engine(
            (*(part.replace("{model}", model) for part in command), *arguments),
            health_path="/v1/models",
            served_model=model or name,
        )
    if command:
        raise ValueError(f"the engine {kind} has a command of its own; give arguments instead")
    if not model:
        raise ValueError(f"the engine {kind} needs a model: a name of a hub, or a folder on the nodes")
    environment = {"HF_HUB_OFFLINE": "1"} if model.startswith("/") else {}
    if kind == TRANSFORMERS:
        device = () if resources.gpu else ("--device", "cpu")
        made = ("transformers", "serve", model, "--host", "{host}", "--port", "{port}", *device, *arguments)
        # It generates one answer at a time.
        return Engine(made, environment, concurrency=1, served_model=model)
    made = ("vllm", "serve", model, "--served-model-name", name, "--host", "{host}", "--port", "{port}")
    made += (*_devices(resources), "--disable-access-log-for-endpoints", "/health,/metrics")
    return Engine((*made, *arguments), {**environment, "VLLM_NO_USAGE_STATS": "1"}, served_model=name)


def _devices(resources: Resources) -> tuple[str, ...]:
    """Return what vLLM is told about its GPUs: how many, or which part of the memory of one."""
    if resources.gpu > 1:
        return "--tensor-parallel-size", str(int(resources.gpu))
    if 0 < resources.gpu < 1:
        # It is a share of the whole memory of the device. The start fails when the share is not free: round down.
        return "--gpu-memory-utilization", f"{math.floor(resources.gpu * 1000) / 1000:g}"
    return ()
