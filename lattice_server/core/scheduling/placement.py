"""Owns whether a task may start on a node. Rule: pure functions of its needs, free resources and reservations."""

import re
from dataclasses import field

from lattice_server.core.frozen import frozen
from lattice_server.core.model import Isolation, NodeSpec, Resources, TaskSpec
from lattice_server.core.runtime import ANY_RUNTIME, Runtime
from lattice_server.core.scheduling.nodes import EPSILON, Node

NAME = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
PYTHON = re.compile(f"{NAME}:{NAME}")


@frozen
class Shape:
    """The needs of a task that placement considers; tasks of one shape are interchangeable to it.

    `entrypoint` is the name of a function that workers have; empty when its code is sent. `is_exclusive` tells that a
    lease of this shape is the only one on its node, and `is_service` that it does not end by itself. `network` are the
    servers that its sandbox may connect to. `nodes` are the nodes that reach the services it needs; None for all.
    """

    resources: Resources
    is_async: bool
    isolation: Isolation
    node_selector: tuple[tuple[str, str], ...]
    entrypoint: str = ""
    runtime: Runtime = ANY_RUNTIME
    is_exclusive: bool = False
    is_service: bool = False
    network: tuple[str, ...] = ()
    nodes: frozenset[str] | None = None
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # A shape is hashed several times for every task, and is built once.
        key = (self.resources, self.is_async, self.isolation, self.node_selector)
        object.__setattr__(self, "_hash", hash((*key, self.entrypoint, self.runtime, self.is_exclusive, self.nodes)))

    def __hash__(self) -> int:
        return self._hash


def shape_of(spec: TaskSpec) -> Shape:
    """Return the needs of a task."""
    function = spec.function
    where = (spec.isolation, spec.node_selector)
    code = (function.entrypoint, function.runtime)
    return Shape(spec.resources, function.is_async, *where, *code, is_service=spec.is_service, network=spec.network)


def suits(shape: Shape, node: NodeSpec) -> bool:
    """Whether `node` may run `shape`, whatever resources it has."""
    if not isolates(shape, node) or not has_code(shape, node):
        return False
    if shape.nodes is not None and node.node_id not in shape.nodes:
        return False
    return all(node.label(k) == v for k, v in shape.node_selector)


def isolates(shape: Shape, node: NodeSpec) -> bool:
    """Whether `node` has the isolation of `shape`, and at that level enforces the servers it may connect to."""
    return shape.isolation in (node.network_isolations & node.isolations if shape.network else node.isolations)


def has_code(shape: Shape, node: NodeSpec) -> bool:
    """Whether the worker of `node` can call the function of `shape`.

    A worker with entry points runs only those; any other runs Python that is sent or named `module:function`.
    """
    if not has_runtime(shape, node):
        return False
    if node.entrypoints:
        return shape.entrypoint in node.entrypoints
    return not shape.entrypoint or PYTHON.fullmatch(shape.entrypoint) is not None


def has_runtime(shape: Shape, node: NodeSpec) -> bool:
    """Whether a node has the runtime that the function of `shape` needs."""
    return shape.runtime.admits(node.runtime)


def devices_on(node: Node, shape: Shape, reserved: Shape | None = None) -> tuple[int, ...] | None:
    """Return the devices to use if `shape` started on a node that suits it now; None when it cannot.

    `reserved` is the shape that the node is reserved for, if any.
    """
    if not node.fits(shape.resources, shape.is_async):
        return None
    if not node.admits(is_exclusive=shape.is_exclusive, is_service=shape.is_service):
        return None
    devices = node.devices_for(shape.resources)
    if devices is None or (reserved is not None and not leaves_room(shape, devices, node, reserved)):
        return None
    return devices


def leaves_room(shape: Shape, devices: tuple[int, ...], node: Node, reserved: Shape) -> bool:
    """Whether `shape` may run on `node` beside a reservation for the shape `reserved`.

    A resource may be used down to the reserved amount. One with less than that free may not be used at all, so that it
    becomes free. An exclusive reservation is for the whole node, services aside.
    """
    wanted, needed = shape.resources, reserved.resources
    if (reserved.is_exclusive and not shape.is_service) or not _spares(node.free_cpu, wanted.cpu, needed.cpu):
        return False
    if not _spares(node.free_memory_bytes, wanted.memory_bytes, needed.memory_bytes):
        return False
    if not devices or (needed.gpu <= 0 and needed.gpu_memory_bytes <= 0):
        return True
    return node.devices_for(needed, besides=wanted, on=devices) is not None


def _spares(free: float, wanted: float, reserved: float) -> bool:
    return wanted <= 0 or free - wanted + EPSILON >= reserved
