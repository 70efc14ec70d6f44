"""Owns the choice of a node. Rule: a pure function of what is wanted and what is free."""

from collections.abc import Iterable
from dataclasses import dataclass

from lattice_server.core.leases import Node
from lattice_server.core.model import Isolation, Resources


@dataclass(frozen=True, slots=True)
class Shape:
    """All that placement looks at; tasks of one shape are interchangeable to it."""

    resources: Resources
    is_async: bool
    isolation: Isolation
    node_selector: tuple[tuple[str, str], ...]


def suits(shape: Shape, node: Node) -> bool:
    """Whether `node` may run `shape` at all, load aside."""
    return shape.isolation in node.isolations and all(node.labels.get(k) == v for k, v in shape.node_selector)


def place(shape: Shape, nodes: Iterable[Node]) -> tuple[Node, tuple[int, ...]] | None:
    """Return the node to run `shape` and the devices to use, or None when nothing is free.

    Tasks that need GPUs go to the fullest node that has them; others spread to the node with most CPUs free, and
    keep off GPU nodes while they can.
    """
    best: tuple[Node, tuple[int, ...]] | None = None
    best_score: tuple[float, float] | None = None
    for node in nodes:
        if not (node.takes_work and node.fits(shape.resources, shape.is_async) and suits(shape, node)):
            continue
        devices = node.devices_for(shape.resources)
        if devices is None:
            continue
        score = (sum(node.free_gpu.values()), -node.free_cpu)
        if best_score is None or score < best_score:
            best, best_score = (node, devices), score
    return best
