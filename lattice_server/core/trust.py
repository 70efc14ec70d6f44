"""Which values a task may be given: a pickle is refused to a task that is less isolated than the task that made it.

Rule: a value of a sandbox is data only if its encoding is one of `DATA`, whose decoders run no code. Values are not
decoded here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lattice_server.core.model import Isolation, Payload, TaskSpec

DATA = frozenset(
    {
        "application/json",
        "application/octet-stream",
        "application/vnd.lattice.tagged+json",
        "application/vnd.lattice.npy",
        "application/vnd.apache.arrow.stream",
    }
)
_STRICTNESS = {level: strictness for strictness, level in enumerate(Isolation)}


def is_weaker(one: Isolation, other: Isolation) -> bool:
    """Whether one level isolates less than another one."""
    return _STRICTNESS[one] < _STRICTNESS[other]


def stamped(payload: Payload, level: Isolation) -> Payload:
    """Return a value that a task of this level produced, which its worker may have named a weaker one for."""
    return replace(payload, produced_at=level) if is_weaker(payload.produced_at, level) else payload


def stamped_all(
    outputs: Mapping[str, Payload], split: Mapping[str, Sequence[Payload]], level: Isolation
) -> tuple[Mapping[str, Payload], Mapping[str, Sequence[Payload]]]:
    """Return the outputs of a task of this level, and their items, as `stamped`."""
    if level is Isolation.NONE:
        return outputs, split
    items = {name: [stamped(item, level) for item in found] for name, found in split.items()}
    return {name: stamped(payload, level) for name, payload in outputs.items()}, items


def unpickles(spec: TaskSpec) -> bool:
    """Whether a task unpickles its inputs; a function that names another language than Python does not."""
    return not spec.function.entrypoint or spec.function.runtime.language in {"", "python"}


def is_trusted(payload: Payload, level: Isolation) -> bool:
    """Whether a task of this level may decode a value."""
    return payload.media_type in DATA or not is_weaker(level, payload.produced_at)


def confined(spec: TaskSpec, parent: TaskSpec) -> TaskSpec:
    """Return a task that another one adds: at the level of its parent, or its own if that is stricter.

    Of the servers that it asks for, it may connect to those of a sandboxed parent.
    """
    if parent.isolation is Isolation.NONE:
        return spec
    if is_weaker(spec.isolation, parent.isolation):
        spec = replace(spec, isolation=parent.isolation)
    allowed = tuple(server for server in spec.network if server in parent.network)
    return spec if allowed == spec.network else replace(spec, network=allowed)
