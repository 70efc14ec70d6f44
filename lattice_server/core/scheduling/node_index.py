"""Owns the order in which nodes are tried. Rule: a placement tries the nodes that are likely to have room first.

Best fit: a task that needs GPUs goes to the fullest node that has them free. Any other task goes to the node with the
most CPUs free, and avoids nodes with free GPUs where possible.
"""

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Mapping
from itertools import count
from operator import itemgetter

from lattice_server.core.model import Isolation, Runtime
from lattice_server.core.scheduling.nodes import EPSILON, Node
from lattice_server.core.scheduling.placement import Shape, devices_on, suits

# A node's free GPUs, its free CPUs as a negative number, and a number that breaks ties.
Entry = tuple[float, float, int, Node]
Needs = tuple[Isolation, bool, tuple[tuple[str, str], ...], str, Runtime]

MAX_LISTS = 64
INFINITY = float("inf")


class NodeIndex:
    """The nodes that accept leases, in order: one list for each set of needs that decides which nodes suit a shape.

    A list is made when a shape is first placed. The least recently used lists are dropped.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._lists: OrderedDict[Needs, tuple[Shape, list[Entry]]] = OrderedDict()
        self._numbers = count()

    def update(self, node: Node) -> None:
        """Sort a node in anew; call it after a change of its free resources or its state."""
        old = self._entries.get(node.node_id)
        if old is not None and old[3] is not node:
            self.remove(old[3])
            old = None
        if not node.takes_work:
            if old is not None:
                self.remove(node)
            return
        number = next(self._numbers) if old is None else old[2]
        new = (sum(node.free_gpu.values()), -node.free_cpu, number, node)
        if old is not None and old[:2] == new[:2]:
            return
        self._entries[node.node_id] = new
        for shape, entries in self._lists.values():
            if old is not None:
                index = bisect_left(entries, old)
                if index == len(entries) or entries[index] is not old:
                    continue
                del entries[index]
                insort(entries, new)
            elif suits(shape, node.spec):
                insort(entries, new)

    def remove(self, node: Node) -> None:
        """Remove a node."""
        old = self._entries.get(node.node_id)
        if old is None or old[3] is not node:
            return
        del self._entries[node.node_id]
        for _, entries in self._lists.values():
            index = bisect_left(entries, old)
            if index < len(entries) and entries[index] is old:
                del entries[index]

    def find(self, shape: Shape, reserved: Mapping[str, Shape]) -> tuple[Node, tuple[int, ...]] | None:
        """Return the first node on which a shape can start, and the devices to use there; None when there is none.

        `reserved` maps nodes to the shapes they are reserved for.
        """
        wanted, entries = shape.resources, self._suited(shape)
        needs_devices = wanted.gpu > 0 or wanted.gpu_memory_bytes > 0
        index = bisect_left(entries, EPSILON, key=itemgetter(0)) if needs_devices else 0
        while index < len(entries):
            free_gpu, negative_cpu, _, node = entries[index]
            if EPSILON - negative_cpu < wanted.cpu:
                # The list continues with nodes that have as much GPU and even fewer CPUs free: skip them.
                index = bisect_right(entries, (free_gpu, INFINITY, 0, node), index)
                continue
            devices = devices_on(node, shape, reserved.get(node.node_id))
            if devices is not None:
                return node, devices
            index += 1
        return None

    def suited(self, shape: Shape) -> list[Node]:
        """Return the nodes that accept leases and suit a shape, whatever their resources."""
        return [entry[3] for entry in self._suited(shape)]

    def check(self, nodes: Mapping[str, Node]) -> None:
        """Assert that every list has the nodes that suit its shape, in order."""
        assert {n.node_id for n in nodes.values() if n.takes_work} == self._entries.keys()
        for free_gpu, negative_cpu, _, node in self._entries.values():
            assert (free_gpu, negative_cpu) == (sum(node.free_gpu.values()), -node.free_cpu), "a node is out of place"
            assert nodes[node.node_id] is node
        for shape, entries in self._lists.values():
            assert entries == sorted(entry for entry in self._entries.values() if suits(shape, entry[3].spec))

    def _suited(self, shape: Shape) -> list[Entry]:
        needs = (shape.isolation, bool(shape.network), shape.node_selector, shape.entrypoint, shape.runtime)
        found = self._lists.get(needs)
        if found is None:
            entries = sorted(entry for entry in self._entries.values() if suits(shape, entry[3].spec))
            found = self._lists[needs] = (shape, entries)
            if len(self._lists) > MAX_LISTS:
                self._lists.popitem(last=False)
        else:
            self._lists.move_to_end(needs)
        return found[1]
