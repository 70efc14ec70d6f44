"""Owns the order in which lines are tried in one round of placing. Rule: passing over many at once changes no turn.

The caller whose clock is furthest behind is next, with the line that is first of its own. Callers whose clocks are the
same alternate, line by line: a turn is a clock, how many lines of its caller had a turn before at this clock, and a
number. Lines that cannot start are not tried, and count all the same.
"""

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import assert_never

from lattice_server.core.batching import INFINITY, OPEN, BatchCollector, Entry, Lane, Stage
from lattice_server.core.placement import Shape
from lattice_server.core.queue import Queue, Tenant

Turn = tuple[float, int, int]  # A caller's clock, how many of its lines had their turn at it, and the caller's number.
Bound = tuple[float, ...] | Entry  # Compares with entries; the empty one is before all.


@dataclass(slots=True, eq=False)
class Caller:
    """One caller in a round. What is before `start` had its turn before it got this clock, and `base` lines at it; what
    is up to `cursor` had its turn."""

    tenant: Tenant
    clock: float
    number: int
    base: int = 0
    start: Bound = ()
    cursor: Bound = ()
    heads: list[tuple[Entry, Lane]] | None = None

    def turn(self, entry: Entry) -> Turn:
        """Return when it is a line's turn."""
        order = self.tenant.order
        return self.clock, self.base + bisect_left(order, entry) - bisect_right(order, self.start), self.number

    def had(self, turn: Turn) -> int:
        """Return how many lines had their turn before another's."""
        order = self.tenant.order
        clock, lap, number = turn
        if self.clock != clock:
            return len(order) if self.clock < clock else bisect_right(order, self.start)
        return min(len(order), bisect_right(order, self.start) + max(0, lap - self.base + (self.number < number)))

    def next(self, is_over: Callable[[Lane], bool]) -> Entry | None:
        """Return the first line after the cursor in a lane that is not over."""
        found: Entry | None = None
        lanes, heads = self.tenant.lanes, self.heads
        if heads is None:
            heads = self.heads = self._heads(is_over)
        # What is looked at again meanwhile joins this lane, anywhere.
        entries = lanes.get(OPEN, [])
        index = bisect_right(entries, self.cursor)
        if index < len(entries):
            found = entries[index]
        while heads:
            entry, lane = heads[0]
            if is_over(lane):
                heapq.heappop(heads)
            elif entry[-1].entry is entry and entry[-1].lane == lane and entry > self.cursor:
                return entry if found is None or entry < found else found
            else:
                entries = lanes.get(lane, [])
                index = bisect_right(entries, self.cursor)
                if index < len(entries):
                    heapq.heapreplace(heads, (entries[index], lane))
                else:
                    heapq.heappop(heads)
        return found

    def _heads(self, is_over: Callable[[Lane], bool]) -> list[tuple[Entry, Lane]]:
        heads = []
        for lane, entries in self.tenant.lanes.items():
            if lane != OPEN and not is_over(lane):
                index = bisect_right(entries, self.cursor)
                if index < len(entries):
                    heads.append((entries[index], lane))
        heapq.heapify(heads)
        return heads


@dataclass(slots=True, eq=False)
class Round:
    """What one round of placing has found.

    `limited` is the line of each limit that goes first when a call of it ends. A kind is a shape without its limit:
    `full` are those that nothing is free for, `blocked_kinds` those of which a line was `blocked`, so that it waits for
    resources only, and `unkept` those that no node can be kept for. `stuck` are the shapes one of which was blocked.
    The first `passed` of the blocked were tried before something else was placed; `least_placed` is the least priority
    placed of each caller. A round `is_settled` when the next one would find the same.
    """

    limited: Mapping[str, BatchCollector]
    full: set[Shape] = field(default_factory=set)
    stuck: set[Shape] = field(default_factory=set)
    blocked: list[BatchCollector] = field(default_factory=list)
    blocked_kinds: set[Shape] = field(default_factory=set)
    unkept: set[Shape] = field(default_factory=set)
    passed: int = 0
    least_placed: dict[str, float] = field(default_factory=dict)
    is_settled: bool = True

    def note_placed(self, tenant: str, priority: int) -> None:
        """Note that something of a caller was placed."""
        self.passed = len(self.blocked)
        self.least_placed[tenant] = min(priority, self.least_placed.get(tenant, INFINITY))

    def note_blocked(self, line: BatchCollector, kind: Shape, *, may_keep: bool) -> None:
        """Note that a line waits for resources only, and whether a node could be kept for its kind."""
        self.stuck.add(line.group.shape)
        self.blocked.append(line)
        self.blocked_kinds.add(kind)
        if not may_keep:
            self.unkept.add(kind)

    def start_again(self) -> None:
        """Note that what could not start may after all: a node is not kept any more."""
        self.full.clear()
        self.blocked_kinds.clear()
        self.unkept.clear()
        self.is_settled = False

    def is_over(self, lane: Lane) -> bool:
        """Whether trying a line of a lane would change nothing."""
        match lane.stage:
            case Stage.ALIKE:
                return lane.shape in self.stuck
            case Stage.WAITING | Stage.PASSED:
                return lane.shape in self.blocked_kinds
            case Stage.RIPE:
                return lane.shape in self.blocked_kinds and lane.shape in self.unkept
            case Stage.LIMITED:
                return lane.limit_key in self.limited
            case Stage.HELD:
                return True
            case Stage.OPEN:
                return False
            case _:
                assert_never(lane.stage)


class Turns:
    """The turns of one round. `is_over` tells whether no line of a lane could start now."""

    def __init__(self, queue: Queue, is_over: Callable[[Lane], bool], now: float) -> None:
        self._queue = queue
        self._is_over = is_over
        self._now = now
        self._turn: Turn = (0.0, 0, 0)
        self._last_served: Turn = (0.0, 0, 0)
        self._numbers = 0
        self._callers: dict[str, Caller] = {}
        self._waiting: list[tuple[Turn, Caller]] = []
        queue.refresh(now)
        self._lanes = list(queue.lanes)
        for tenant in queue.tenants.values():
            caller = self._callers[tenant.name] = Caller(tenant, queue.clocks.turn(tenant.name, now), self._number())
            self._line_up(caller)
        heapq.heapify(self._waiting)

    def next(self) -> BatchCollector | None:
        """Return the line whose turn it is; say afterwards what became of it, by `served` or `passed`."""
        while self._waiting:
            turn, caller = self._waiting[0]
            entry = caller.next(self._is_over)
            if entry is None:
                heapq.heappop(self._waiting)
                if self._are_all_over():
                    self._waiting.clear()
            elif (real := caller.turn(entry)) != turn:
                heapq.heapreplace(self._waiting, (real, caller))
            else:
                self._turn, caller.cursor = turn, entry
                return entry[-1]
        return None

    def served(self, collector: BatchCollector) -> None:
        """Note that the line whose turn it was had a batch placed."""
        name, (clock, lap, _) = collector.group.tenant, self._turn
        self._last_served = self._turn
        self._queue.clocks.serve(name, self._now)
        self._queue.update(collector, self._now)
        caller = self._callers[name]
        if name not in self._queue.tenants:
            heapq.heappop(self._waiting)
            del self._callers[name]
            return
        caller.start, caller.clock = caller.cursor, self._queue.clocks.turn(name, self._now)
        if caller.clock == clock:
            caller.base = lap + 1
        else:
            caller.base, caller.number = 0, self._number()

    def passed(self, collector: BatchCollector, lane: Lane) -> None:
        """Note that the line whose turn it was could not be placed in this round, and what it waits for."""
        self._queue.park(collector, lane)

    def reopen(self) -> None:
        """Have lanes tried that were over, by those whose turn is still to come."""
        self._waiting.clear()
        self._lanes = list(self._queue.lanes)
        for caller in self._callers.values():
            if had := caller.had(self._turn):
                caller.cursor = max(caller.cursor, caller.tenant.order[had - 1])
            caller.heads = None
            self._line_up(caller)
        heapq.heapify(self._waiting)

    def passed_over(self, stage: Stage) -> Iterator[tuple[Tenant, Bound]]:
        """Yield callers with lines at a stage, and before which line all of them had their turn when the last one was
        served."""
        for caller in self._callers.values():
            if all(lane.stage is not stage for lane in caller.tenant.lanes):
                continue
            order, had = caller.tenant.order, caller.had(self._last_served)
            yield caller.tenant, order[had] if had < len(order) else (INFINITY,)

    def _line_up(self, caller: Caller) -> None:
        # No later than it is; `next` finds out which of its lines that is and when.
        self._waiting.append(((caller.clock, caller.base, caller.number), caller))

    def _are_all_over(self) -> bool:
        """Whether no caller has a line left that could start; it may be that none has when this is False."""
        while self._lanes and self._is_over(self._lanes[-1]):
            self._lanes.pop()
        return not self._lanes and OPEN not in self._queue.lanes

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers
