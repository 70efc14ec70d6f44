"""Owns the choice of a node. Rule: pure functions of what is wanted, what is free, and what is kept for others."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from lattice_server.core.model import ANY_RUNTIME, Capacity, Isolation, Resources, Runtime, TaskSpec
from lattice_server.core.scheduling.nodes import EPSILON, Node

NAME = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
UNITS = {20: "MiB", 30: "GiB", 40: "TiB"}
PYTHON = re.compile(f"{NAME}:{NAME}")


@dataclass(frozen=True, slots=True)
class Shape:
    """All that placement looks at; tasks of one shape are interchangeable to it.

    `entrypoint` is the function by the name workers have for it; empty when its code travels. `runtime` is what must
    run that. `is_exclusive` tells that a lease of it is the only one on its node while it lasts.
    """

    resources: Resources
    is_async: bool
    isolation: Isolation
    node_selector: tuple[tuple[str, str], ...]
    entrypoint: str = ""
    runtime: Runtime = ANY_RUNTIME
    is_exclusive: bool = False
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # It is looked up several times for every task, and made once.
        key = (self.resources, self.is_async, self.isolation, self.node_selector)
        object.__setattr__(self, "_hash", hash((*key, self.entrypoint, self.runtime, self.is_exclusive)))

    def __hash__(self) -> int:
        return self._hash


def shape_of(spec: TaskSpec) -> Shape:
    """Return what placement looks at in a task."""
    function = spec.function
    where = (spec.isolation, spec.node_selector)
    return Shape(spec.resources, function.is_async, *where, function.entrypoint, function.runtime)


def suits(shape: Shape, node: Node) -> bool:
    """Whether `node` may run `shape` at all, load and size aside."""
    if shape.isolation not in node.isolations or not has_code(shape, node):
        return False
    return all(node.labels.get(k) == v for k, v in shape.node_selector)


def has_code(shape: Shape, node: Node) -> bool:
    """Whether the worker of `node` can call what `shape` calls.

    One with entry points of its own runs those only; any other runs Python, be it sent or named `module:function`.
    """
    if not has_runtime(shape, node):
        return False
    if node.entrypoints:
        return shape.entrypoint in node.entrypoints
    return not shape.entrypoint or PYTHON.fullmatch(shape.entrypoint) is not None


def has_runtime(shape: Shape, node: Node) -> bool:
    """Whether what runs code on a node is what the function of `shape` needs."""
    return shape.runtime.admits(node.runtime)


def could_run(shape: Shape, node: Node) -> bool:
    """Whether `node` could run `shape` if it were idle."""
    return not shortages(shape, idle(node))


def devices_on(node: Node, shape: Shape, kept: Shape | None = None) -> tuple[int, ...] | None:
    """Return the devices to use if `shape` started on a node now; None when it cannot.

    `kept` is the shape for which room must be, or become, free there. Whether the node suits is not looked at.
    """
    if not node.fits(shape.resources, shape.is_async) or not node.admits(is_exclusive=shape.is_exclusive):
        return None
    devices = node.devices_for(shape.resources)
    if devices is None or (kept is not None and not leaves_room(shape, devices, node, kept)):
        return None
    return devices


def leaves_room(shape: Shape, devices: tuple[int, ...], node: Node, kept: Shape) -> bool:
    """Whether running `shape` on `node` takes nothing of what is kept there.

    What the node has enough of may be used down to what is kept; what it is short of may not be used at all, so that
    it gathers. An exclusive lease needs the whole node.
    """
    wanted, needed = shape.resources, kept.resources
    if kept.is_exclusive or not _spares(node.free_cpu, wanted.cpu, needed.cpu):
        return False
    if not _spares(node.free_memory_bytes, wanted.memory_bytes, needed.memory_bytes):
        return False
    if not devices or (needed.gpu <= 0 and needed.gpu_memory_bytes <= 0):
        return True
    return node.devices_for(needed, besides=wanted, on=devices) is not None


def _spares(free: float, wanted: float, kept: float) -> bool:
    return wanted <= 0 or free - wanted + EPSILON >= kept


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a node does not run something: a resource it is short of, in its unit, or a fact about it."""

    node_id: str
    what: str
    wanted: float = 0.0
    free: float = 0.0

    def __str__(self) -> str:
        """Return a sentence's worth of it."""
        return self.told("free")

    def told(self, there: str) -> str:
        """Return a sentence's worth of it, in which what the node has is called `there`: `free`, or `in all`."""
        match self.what:
            case "memory" | "gpu_memory":
                wanted, found = _sizes(self.wanted, self.free)
                amounts = f"{self.what.replace('_', ' ')}: {wanted} wanted, {found} {there}"
            case "cpu" | "gpu":
                amounts = f"{self.what}: {self.wanted:g} wanted, {self.free:g} {there}"
            case _:
                amounts = self.what
        return f"node {self.node_id!r}: {amounts}"


def shortages(shape: Shape, node: Node) -> list[Shortage]:
    """Return why `shape` cannot start on `node`; nothing when it could."""
    name, wanted, found = node.node_id, shape.resources, []
    if shape.isolation not in node.isolations:
        return [Shortage(name, f"it cannot isolate by {shape.isolation.value}")]
    if not has_runtime(shape, node):
        return [Shortage(name, f"it runs {node.runtime}, and the function is for {shape.runtime}")]
    if not has_code(shape, node):
        if not shape.entrypoint:
            return [Shortage(name, "it runs its own entry points only")]
        return [Shortage(name, f"it has no entry point {shape.entrypoint!r}")]
    for key, value in shape.node_selector:
        if node.labels.get(key) != value:
            return [Shortage(name, f"its label {key} is {node.labels.get(key, '')!r}, not {value!r}")]
    if node.is_draining:
        return [Shortage(name, "it is being drained")]
    if node.detached_at is not None:
        return [Shortage(name, "its worker is not connected")]
    if not node.admits(is_exclusive=shape.is_exclusive):
        return [Shortage(name, _exclusion(shape, node))]
    if node.free_cpu + EPSILON < wanted.cpu:
        found.append(Shortage(name, "cpu", wanted.cpu, max(0.0, node.free_cpu)))
    if node.free_memory_bytes < wanted.memory_bytes:
        found.append(Shortage(name, "memory", wanted.memory_bytes, node.free_memory_bytes))
    if not node.fits(Resources(0.0), shape.is_async):
        found.append(Shortage(name, "all of its slots are in use"))
    if node.devices_for(wanted) is None:
        found.append(_gpu_shortage(name, wanted, node))
    return found


def _exclusion(shape: Shape, node: Node) -> str:
    if not shape.is_exclusive:
        return "the task on it runs alone on its node because a worker was lost under it"
    held = sum(len(slot.lease_ids) for slot in node.slots.values())
    others = "another attempt is" if held == 1 else f"{held} other attempts are"
    return f"{others} on it, and the task runs alone on its node because a worker was lost under it"


def _gpu_shortage(name: str, wanted: Resources, node: Node) -> Shortage:
    memory = node.free_gpu_memory_bytes
    sharing = node.sharing(wanted, node.free_gpu, memory)
    if len(sharing) < wanted.gpu:
        shares = node.free_gpu.values()
        return Shortage(name, "gpu", wanted.gpu, len(sharing) if wanted.gpu >= 1 else max(shares, default=0.0))
    # Each of as many devices needs that much, so the scarcest of the best ones tells.
    most = sorted((memory[index] for index in sharing), reverse=True)
    count = max(1, int(wanted.gpu))
    return Shortage(name, "gpu_memory", wanted.gpu_memory_bytes, most[count - 1] if len(most) >= count else 0)


def impossibility(shape: Shape, nodes: Iterable[Node]) -> str:
    """Return why no node could ever run `shape`, for people; empty when one could, or when no node is known."""
    reasons: list[Shortage] = []
    for node in nodes:
        found = shortages(shape, idle(node))
        if not found:
            return ""
        reasons += found
    return "; ".join(reason.told("in all") for reason in reasons)


def idle(node: Node) -> Node:
    """Return a node like `node` that is there and on which nothing runs."""
    fields = (node.node_id, node.worker_id, node.session_id, node.hostname, node.node_ip, node.capacity, node.labels)
    return Node(*fields, node.isolations, node.runtime, node.pid, node.entrypoints)


@dataclass(slots=True)
class Total:
    """What all nodes offer together; `gpus` counts devices."""

    nodes: int = 0
    cpu: float = 0.0
    memory_bytes: int = 0
    gpus: int = 0
    gpu_memory_bytes: int = 0
    slots: int = 0
    async_slots: int = 0

    def add(self, offer: Capacity, sign: int) -> None:
        """Add what a node offers, or with `sign` -1 take it away."""
        self.nodes += sign
        # Fractions added and taken away many times do not add up to nothing.
        self.cpu = self.cpu + sign * offer.cpu if self.nodes else 0.0
        self.memory_bytes += sign * offer.memory_bytes
        self.gpus += sign * len(offer.gpus)
        self.gpu_memory_bytes += sign * sum(gpu.memory_bytes for gpu in offer.gpus)
        self.slots += sign * offer.slots
        self.async_slots += sign * offer.async_slots


def share_of(resources: Resources, is_async: bool, total: Total) -> float:
    """Return the largest share of the cluster's `total` that `resources` take: what a caller's use is counted by."""
    slots = total.async_slots if is_async else total.slots
    shares = [1.0 / slots if slots else 1.0]
    if total.cpu > 0:
        shares.append(resources.cpu / total.cpu)
    if total.memory_bytes > 0:
        shares.append(resources.memory_bytes / total.memory_bytes)
    if total.gpus:
        shares.append(resources.gpu / total.gpus)
        if total.gpu_memory_bytes:
            shares.append(resources.gpu_memory_bytes * max(1.0, resources.gpu) / total.gpu_memory_bytes)
    return max(shares)


def _sizes(wanted_bytes: float, found_bytes: float) -> tuple[str, str]:
    """Return two sizes for people; in bytes when they would look the same."""
    wanted, found = _size(wanted_bytes), _size(found_bytes)
    return (f"{wanted_bytes:.0f} bytes", f"{found_bytes:.0f} bytes") if wanted == found else (wanted, found)


def _size(size_bytes: float) -> str:
    exponent = next((e for e in (40, 30) if size_bytes >= 2**e), 20)
    return f"{size_bytes / 2**exponent:.4g} {UNITS[exponent]}"
