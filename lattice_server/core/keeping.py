"""Owns which nodes are kept for what waits. Rule: what others have passed for long has a node gather what it needs."""

import heapq
from collections.abc import Iterator, Mapping

from lattice_server.core.batching import INFINITY, BatchCollector
from lattice_server.core.fleet import Fleet
from lattice_server.core.leases import Node
from lattice_server.core.placement import Shape

KEEP_AFTER_S = 1.0  # What others have passed for this long has a node kept for it.


class Keeping:
    """The nodes kept. `has_freed` tells that one is kept no longer, since somebody set it to False."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._kept: dict[str, BatchCollector] = {}
        self._nodes: dict[BatchCollector, str] = {}
        self._ripening: list[tuple[float, int, BatchCollector]] = []
        self._numbers = 0
        self.has_freed = False

    def kept_for(self, node: Node) -> BatchCollector | None:
        """Return what a node gathers its resources for."""
        collector = self._kept.get(node.node_id)
        return collector if collector is not None and collector.count else None

    def node_of(self, collector: BatchCollector) -> str | None:
        """Return the node that is kept for a line."""
        return self._nodes.get(collector)

    def reserved(self, collector: BatchCollector) -> Mapping[str, Shape]:
        """Return for what room must stay, or become, free on nodes because of others than a line."""
        own = self._nodes.get(collector)
        return {name: c.group.shape for name, c in self._kept.items() if name != own}

    def forget(self) -> None:
        """Keep no node for what no longer waits, nor one that cannot run what it is kept for."""
        for name, collector in list(self._kept.items()):
            node = self._fleet.nodes.get(name)
            is_kept = collector.count and node is not None and node.takes_work
            if node is None or not is_kept or not self._fleet.could_run(collector.group.shape, node):
                del self._kept[name], self._nodes[collector]

    def block(self, collector: BatchCollector, now: float) -> bool:
        """Note that a line waits for resources only; keep a node for it when it is time. False when there is none."""
        if collector.blocked_since is None:
            collector.blocked_since, collector.was_passed = now, False
        elif self.is_ripe(collector, now):
            return self._keep_node(collector)
        return True

    def unblock(self, collector: BatchCollector) -> None:
        """Note that a line does not wait for resources, and keep nothing for it."""
        collector.blocked_since, collector.was_passed = None, False
        name = self._nodes.pop(collector, None)
        if name is not None:
            del self._kept[name]
            self.has_freed = True

    def is_ripe(self, collector: BatchCollector, now: float) -> bool:
        """Whether it is time to keep a node for a line that waits for resources only."""
        since = collector.blocked_since
        return since is not None and collector.was_passed and now >= since + KEEP_AFTER_S

    def watch(self, collector: BatchCollector) -> None:
        """Have `ripened` return a line that was passed once it is ripe."""
        if collector.blocked_since is not None:
            self._numbers += 1
            heapq.heappush(self._ripening, (collector.blocked_since + KEEP_AFTER_S, self._numbers, collector))

    def ripened(self, now: float) -> Iterator[BatchCollector]:
        """Take out the lines that are watched and ripe by now."""
        while self._ripening and self._ripening[0][0] <= now:
            collector = heapq.heappop(self._ripening)[-1]
            if self.is_ripe(collector, now):
                yield collector

    def next_ripe(self) -> float:
        """Return no later than when a line that is watched is ripe next."""
        return self._ripening[0][0] if self._ripening else INFINITY

    def _keep_node(self, collector: BatchCollector) -> bool:
        if collector in self._nodes:
            return True
        shape = collector.group.shape
        nodes = [
            node
            for node in self._fleet.nodes.values()
            if self.kept_for(node) is None and node.takes_work and self._fleet.could_run(shape, node)
        ]
        if nodes:
            best = max(nodes, key=lambda node: _nearness(node, shape))
            self._kept[best.node_id] = collector
            self._nodes[collector] = best.node_id
        return bool(nodes)


def _nearness(node: Node, shape: Shape) -> tuple[float, float, float]:
    """Return what is greatest for the node that is likely to have room for a shape first."""
    leases = sum(len(slot.lease_ids) for slot in node.slots.values()) if shape.is_exclusive else 0
    return -leases, sum(node.free_gpu.values()) if shape.resources.gpu else 0.0, node.free_cpu
