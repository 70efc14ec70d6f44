"""Owns the share of the cluster that a call takes, by which the use of a tenant is counted."""

from dataclasses import dataclass

from lattice_server.core.model import Capacity, Resources


@dataclass(slots=True)
class Total:
    """The sum of the capacities of all nodes; `gpus` counts devices."""

    nodes: int = 0
    cpu: float = 0.0
    memory_bytes: int = 0
    gpus: int = 0
    gpu_memory_bytes: int = 0
    slots: int = 0
    async_slots: int = 0

    def add(self, capacity: Capacity, sign: int) -> None:
        """Add a node's capacity, or subtract it when `sign` is -1."""
        self.nodes += sign
        # Sums of many fractions drift.
        self.cpu = self.cpu + sign * capacity.cpu if self.nodes else 0.0
        self.memory_bytes += sign * capacity.memory_bytes
        self.gpus += sign * len(capacity.gpus)
        self.gpu_memory_bytes += sign * sum(gpu.memory_bytes for gpu in capacity.gpus)
        self.slots += sign * capacity.slots
        self.async_slots += sign * capacity.async_slots


def share_of(resources: Resources, is_async: bool, total: Total) -> float:
    """Return the largest share of the cluster's `total` that `resources` take: the dominant share."""
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
