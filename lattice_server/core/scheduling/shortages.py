"""Owns why a task cannot start on a node. Rule: a node runs a task exactly when it has no shortage for it."""

from collections.abc import Iterable

from lattice_server.core.frozen import frozen
from lattice_server.core.model import NodeSpec, Resources
from lattice_server.core.scheduling.nodes import EPSILON, Node
from lattice_server.core.scheduling.placement import Shape, has_code, has_runtime, isolates
from lattice_server.core.states import NodeState, SessionState

UNITS = {20: "MiB", 30: "GiB", 40: "TiB"}


@frozen
class Shortage:
    """Why a node cannot start a task: a resource it is short of, with amounts in its unit, or a fact about the node."""

    node_id: str
    what: str
    wanted: float = 0.0
    free: float = 0.0

    def __str__(self) -> str:
        return self.describe("free")

    def describe(self, there: str) -> str:
        """Return it as text, in which the node's amount is called `there`: `free`, or `in all`."""
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
    """Return why `shape` cannot start on `node`; empty when it could."""
    name, wanted, found = node.node_id, shape.resources, []
    if shape.isolation not in node.spec.isolations:
        why = node.spec.isolation_refusals.get(shape.isolation, "")
        return [Shortage(name, f"it cannot isolate by {shape.isolation.value}{why and f' ({why})'}")]
    if not isolates(shape, node.spec):
        level = shape.isolation.value
        return [Shortage(name, f"at isolation {level} it cannot restrict which servers a task connects to")]
    if not has_runtime(shape, node.spec):
        return [Shortage(name, f"it runs {node.spec.runtime}, and the function is for {shape.runtime}")]
    if not has_code(shape, node.spec):
        if not shape.entrypoint:
            return [Shortage(name, "it runs its own entry points only")]
        return [Shortage(name, f"it has no entry point {shape.entrypoint!r}")]
    for key, value in shape.node_selector:
        has = node.spec.label(key)
        if has is None:
            return [Shortage(name, f"it has no label {key}, and {value!r} is wanted")]
        if has != value:
            return [Shortage(name, f"its label {key} is {has!r}, not {value!r}")]
    if shape.nodes is not None and name not in shape.nodes:
        return [Shortage(name, "it reaches no instance of a service that the task needs")]
    if node.state is not NodeState.READY:
        return [Shortage(name, "it is being drained")]
    if node.session is not SessionState.CONNECTED:
        return [Shortage(name, "its worker is not connected")]
    if not node.admits(is_exclusive=shape.is_exclusive, is_service=shape.is_service):
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
    held = node.attempts_beside_services()
    others = "another attempt is" if held == 1 else f"{held} other attempts are"
    return f"{others} on it, and the task runs alone on its node because a worker was lost under it"


def _gpu_shortage(name: str, wanted: Resources, node: Node) -> Shortage:
    memory = node.free_gpu_memory_bytes
    sharing = node.sharing(wanted, node.free_gpu, memory)
    if len(sharing) < wanted.gpu:
        shares = node.free_gpu.values()
        return Shortage(name, "gpu", wanted.gpu, len(sharing) if wanted.gpu >= 1 else max(shares, default=0.0))
    # Each of `count` devices needs the amount, so the device with the least memory among the best ones decides.
    most = sorted((memory[index] for index in sharing), reverse=True)
    count = max(1, int(wanted.gpu))
    return Shortage(name, "gpu_memory", wanted.gpu_memory_bytes, most[count - 1] if len(most) >= count else 0)


def could_run(shape: Shape, node: NodeSpec) -> bool:
    """Whether a node could run `shape` if nothing else ran there."""
    return not shortages(shape, Node(node, ""))


def impossibility(shape: Shape, nodes: Iterable[NodeSpec]) -> str:
    """Return, as text, why no node could ever run `shape`; empty when one could, or when no node is known."""
    reasons: list[Shortage] = []
    for node in nodes:
        found = shortages(shape, Node(node, ""))
        if not found:
            return ""
        reasons += found
    return "; ".join(reason.describe("in all") for reason in reasons)


def _sizes(wanted_bytes: float, found_bytes: float) -> tuple[str, str]:
    """Return two sizes as text; in bytes when they would look the same."""
    wanted, found = _size(wanted_bytes), _size(found_bytes)
    return (f"{wanted_bytes:.0f} bytes", f"{found_bytes:.0f} bytes") if wanted == found else (wanted, found)


def _size(size_bytes: float) -> str:
    exponent = next((e for e in (40, 30) if size_bytes >= 2**e), 20)
    return f"{size_bytes / 2**exponent:.4g} {UNITS[exponent]}"
