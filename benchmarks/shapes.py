"""Owns the kinds of task that simulated agents are made of. Rule: durations are log-normal, by median and spread."""

from dataclasses import dataclass

from lattice_server.core.model import Resources

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of task: the resources of an attempt, and its duration. `spread` is the deviation of its logarithm."""

    median_s: float
    spread: float
    resources: Resources
    is_async: bool = False


KINDS = {
    # A call of a language model somewhere else: it waits and needs no processor.
    "think": Kind(1.2, 0.6, Resources(cpu=0.0), is_async=True),
    "search": Kind(0.6, 0.8, Resources(cpu=0.0), is_async=True),
    "parse": Kind(0.008, 0.5, Resources()),
    "code": Kind(0.5, 1.0, Resources()),
    "render": Kind(1.5, 0.8, Resources(cpu=2.0, memory_bytes=2 * GIB)),
    "vision": Kind(0.4, 0.6, Resources(cpu=1.0, gpu=0.25, gpu_memory_bytes=4 * GIB)),
    "load": Kind(2.0, 0.5, Resources()),
    "embed": Kind(0.4, 0.5, Resources(cpu=0.25, gpu=0.2, gpu_memory_bytes=2 * GIB)),
    "index": Kind(3.0, 0.4, Resources(cpu=2.0, memory_bytes=4 * GIB)),
    "evaluate": Kind(1.0, 0.8, Resources(memory_bytes=GIB)),
}

# Which tools agents call, and how often.
TOOLS = {"search": 0.25, "parse": 0.2, "code": 0.3, "render": 0.13, "vision": 0.12}
