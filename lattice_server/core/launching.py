"""Owns the way from waiting to a worker: turns, limits, nodes kept for big tasks, work sent ahead. Part of `dispatch`.

Rule: whoever is next in turn and cannot start is never made to wait longer by those behind it.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from lattice_server.core.attempts import Lease, Task
from lattice_server.core.batching import HELD, INFINITY, OPEN, BatchCollector, Lane, Stage
from lattice_server.core.fleet import Fleet
from lattice_server.core.keeping import KEEP_AFTER_S, Keeping
from lattice_server.core.leases import Node, Slot
from lattice_server.core.messages import Assign, AttemptInputs, RevokeLease
from lattice_server.core.placement import Shape, place
from lattice_server.core.queue import Queue
from lattice_server.core.turns import Round, Turns

SEND_AHEAD_S = 0.010  # Work worth at most this long waits behind other work on a worker.
SEND_AHEAD_LEASES = 64
PATIENCE_S = 0.020  # What waits behind one attempt for longer is taken back.
SHARED_AHEAD_S = 0.002  # The same while callers share the cluster: none waits long for what others sent ahead.
SHARED_FOR_S = 0.1  # How long after the last change from one caller to another they are thought to share it.
MAX_FUNCTIONS = 10_000  # Of how many functions it is known how long they take.


class Launcher:
    """Turns waiting tasks into leases, and gives back what leases held.

    `parallel` counts the calls that run, by limit and by how many they allow; `limited` is what waits longest for each.
    """

    def __init__(
        self,
        fleet: Fleet,
        numbers: Iterator[int],
        epoch: str,
        emit: Callable[[Assign | RevokeLease], None],
        limits: Mapping[str, int],
    ) -> None:
        self.queue = Queue()
        self.leases: dict[str, Lease] = {}
        self.parallel: dict[str, Counter[int]] = {}
        self.limits = limits
        self.limited: dict[str, BatchCollector] = {}
        self.keeping = Keeping(fleet)
        self._fleet = fleet
        self._numbers = numbers
        self._epoch = epoch
        self._emit = emit
        self._running: dict[Shape, dict[int, Slot]] = {}
        self._crowded: dict[int, Slot] = {}
        self._durations: dict[str, float] = {}
        self._quick: set[str] = set()  # Functions that were worth sending ahead once.
        self._round = Round(self.limited)
        self._look_at = -INFINITY
        self._looked_at = 0.0
        self._steady_until: float | None = None
        self._placed_at = 0.0
        self._last_tenant = ""
        self._shared_at = -SHARED_FOR_S

    def look_again(self) -> None:
        """Note that something changed by which more may be placed."""
        self._look_at = -INFINITY

    def place_waiting(self, now: float) -> None:
        """Place what can be placed, in turn; nothing is tried while nothing could have changed since the last time."""
        self._placed_at = now
        if not self._may_place(now):
            return
        self._looked_at, self._steady_until = now, None
        self.keeping.forget()
        for ripe in self.keeping.ripened(now):
            if ripe.entry is not None and ripe.lane.stage is Stage.PASSED:
                self.queue.park(ripe, Lane(Stage.RIPE, ripe.lane.shape))
        self.limited.clear()
        self._round = Round(self.limited)
        turns = Turns(self.queue, self._round.is_over, now)
        while (line := turns.next()) is not None:
            if self._try(line, now):
                turns.served(line)
            else:
                turns.passed(line, self._lane_of(line, now))
            if self.keeping.has_freed:
                self.keeping.has_freed = False
                self._round.start_again()
                turns.reopen()
        if self._round.least_placed:
            self._note_passed(turns, now)
        self._look_at = self._next_look(now)

    def _may_place(self, now: float) -> bool:
        """Whether more could be placed than the last time, or in another order."""
        if now >= self._look_at or self.queue.has_changed:
            return True
        if self._steady_until is None:
            # Only time went by since. Most rounds are followed by one for another reason, so it was not asked then.
            self._steady_until = self.queue.clocks.steady_until(self.queue.tenants, self._looked_at)
        return now >= self._steady_until

    def _try(self, line: BatchCollector, now: float) -> bool:
        """Place a batch of a line whose turn it is, or note why none could be."""
        current, shape, priority = self._round, line.group.shape, line.priority()
        if shape.limit_key in self.limited or (shape in current.stuck and self.keeping.node_of(line) is None):
            return False
        if self._launch(line, now):
            current.note_placed(line.group.tenant, priority)
            return True
        if self.limit_reached(shape) is None:
            current.note_blocked(line, self._fleet.kind(shape), may_keep=self.keeping.block(line, now))
            return False
        self.keeping.unblock(line)
        if any(self._fleet.could_run(shape, node) for node in self._fleet.nodes.values()):
            # Calls that a limit allows more of must not keep one that it allows fewer of out for good.
            self.limited[shape.limit_key] = line
        return False

    def _note_passed(self, turns: Turns, now: float) -> None:
        """Note which lines that wait for resources others have passed."""
        current = self._round
        for index, collector in enumerate(current.blocked):
            # Some go first by rank alone; that must not go on for ever either.
            least = current.least_placed.get(collector.group.tenant, INFINITY)
            if collector.lane.stage is not Stage.WAITING and (index < current.passed or least <= collector.priority()):
                collector.was_passed = True
        for tenant, bound in turns.passed_over(Stage.WAITING):
            least = current.least_placed.get(tenant.name, INFINITY)
            for lane, entries in list(tenant.lanes.items()):
                if lane.stage is Stage.WAITING:
                    count = max(bisect_left(entries, bound), bisect_left(entries, (-least, INFINITY)))
                    for *_, collector in entries[:count]:
                        collector.was_passed = True
                        self.queue.park(collector, self._lane_of(collector, now))

    def _next_look(self, now: float) -> float:
        """Return no later than when something could be placed, or a node kept, by time alone."""
        if self._round.least_placed or not self._round.is_settled:
            return -INFINITY
        due = self.queue.next_due()
        at = [self.keeping.next_ripe(), INFINITY if due is None else due]
        for collector in self._round.blocked:
            if collector.was_passed and collector.blocked_since is not None:
                ripe_at = collector.blocked_since + KEEP_AFTER_S
                if ripe_at > now:
                    at.append(ripe_at)
        return min(at)

    def _lane_of(self, collector: BatchCollector, now: float) -> Lane:
        """Return where a line waits that was tried in vain: with others that need not be tried either."""
        shape = collector.group.shape
        if self.keeping.node_of(collector) is not None:
            return OPEN
        if not shape.limit_key:
            return Lane(Stage.ALIKE, shape)
        key, head = self.queue.keys[shape.limit_key], collector.head()
        if not key.is_plain or head is None:
            return OPEN
        is_single = not shape.is_async and collector.group.policy is None
        may_go_ahead = is_single and shape in self._running and head.ready.spec.function.digest in self._quick
        if self.limit_reached(shape) is not None:
            is_alone = key.owners.total() == 1 and not may_go_ahead
            return HELD if is_alone else Lane(Stage.LIMITED, limit_key=shape.limit_key)
        if self.queue.shapes[shape] > 1:
            return Lane(Stage.ALIKE, shape)
        if may_go_ahead or collector.blocked_since is None:
            return OPEN
        kind = self._fleet.kind(shape)
        if not collector.was_passed:
            return Lane(Stage.WAITING, kind)
        if self.keeping.is_ripe(collector, now):
            return Lane(Stage.RIPE, kind)
        self.keeping.watch(collector)
        return Lane(Stage.PASSED, kind)

    def limit_reached(self, shape: Shape) -> int | None:
        """Return the limit that keeps `shape` from starting one more call; None when none does.

        Calls of one key may disagree on how many of them may run; the strictest of those that would run holds.
        """
        if not shape.limit_key:
            return None
        running = self.running_calls(shape.limit_key)
        limits = [shape.max_parallel, *self.parallel.get(shape.limit_key, ())]
        least = min((limit for limit in limits if limit > 0), default=None)
        allowed = self.limits.get(shape.limit_key)
        if allowed is not None and (least is None or allowed < least):
            least = allowed
        return least if least is not None and running >= least else None

    def expected_s(self, task: Task) -> float | None:
        """Return how long an attempt of the task's function usually runs; None when that is not known."""
        return self._durations.get(task.ready.spec.function.digest)

    def learn(self, task: Task, duration_s: float) -> None:
        """Note how long an attempt ran."""
        self.look_again()
        digest = task.ready.spec.function.digest
        known = self._durations.pop(digest, duration_s)
        self._durations[digest] = known + 0.3 * (duration_s - known)
        if digest not in self._quick and self._durations[digest] <= SEND_AHEAD_S:
            self._quick.add(digest)
            for limit_key in self.queue.keys:
                self.queue.reopen(limit_key)
        if len(self._durations) > MAX_FUNCTIONS:
            oldest = next(iter(self._durations))
            del self._durations[oldest]
            self._quick.discard(oldest)

    def running_slots(self, shape: Shape) -> int:
        """Return how many slots run calls of this shape."""
        return len(self._running.get(shape, ()))

    def running_calls(self, limit_key: str) -> int:
        """Return how many calls run that count for a limit."""
        calls = self.parallel.get(limit_key)
        return 0 if calls is None else calls.total()

    def send_along(self, task: Task) -> None:
        """Send what follows a leased task to the same slot, so that the worker goes on without asking.

        Only along a chain: of several followers all but one would run sooner elsewhere.
        """
        while len(task.followers) == 1:
            lease = self.leases[task.lease_id]
            slot = lease.slot
            if lease.is_revoked or len(lease.tasks) > 1 or not self._fleet.nodes[slot.node_id].takes_work:
                return
            (following,) = task.followers.values()
            expected_s = self.expected_s(following)
            if expected_s is None or following.lease_id or following.shape != task.shape:
                return
            if task.shape.is_async or task.shape.is_exclusive:
                return
            if following.ready.spec.batch is not None or not self._has_room(slot, expected_s):
                return
            self._assign([following], slot, expected_s)
            task = following

    def take_back(self, now: float) -> None:
        """Revoke what waits behind attempts that turned out to be long."""
        for slot in list(self._crowded.values()):
            if now < slot.progress_at + PATIENCE_S:
                continue
            del self._crowded[slot.slot_id]
            slot.is_slow = True
            self._revoke(slot)

    def vacate(self, node: Node) -> None:
        """Revoke what a node has not come to."""
        for slot in node.slots.values():
            self._revoke(slot)

    def next_deadline(self) -> float | None:
        """Return when `take_back` or `place_waiting` is due next."""
        due = [slot.progress_at + PATIENCE_S for slot in self._crowded.values()]
        if (batch := self.queue.next_due()) is not None:
            due.append(batch)
        return min(due, default=None)

    def held_by(self, node: Node) -> list[Lease]:
        """Return the leases of a node, slot by slot in the order in which they run."""
        return [self.leases[lease_id] for slot in node.slots.values() for lease_id in slot.lease_ids]

    def release(self, lease: Lease, now: float) -> None:
        """Give back what a lease held."""
        slot, clocks = lease.slot, self.queue.clocks
        self.look_again()
        del self.leases[lease.lease_id]
        is_first = next(iter(slot.lease_ids)) == lease.lease_id
        del slot.lease_ids[lease.lease_id]
        slot.backlog_s = max(0.0, slot.backlog_s - lease.expected_s)
        if is_first:
            # What leaves from behind it says nothing about the attempt in front.
            slot.progress_at, slot.is_slow = now, False
            clocks.hold(lease.tenant, -lease.share, now)
            if slot.lease_ids:
                following = self.leases[next(iter(slot.lease_ids))]
                clocks.send_ahead(following.tenant, -following.share * following.expected_s, now)
                clocks.hold(following.tenant, following.share, now)
        else:
            clocks.send_ahead(lease.tenant, -lease.share * lease.expected_s, now)
        if len(slot.lease_ids) < 2:
            self._crowded.pop(slot.slot_id, None)
        if not slot.lease_ids:
            self._free(slot, lease.shape)

    def assignment(self, lease: Lease) -> Assign:
        """Return the message that hands a lease to its worker."""
        first = lease.tasks[0]
        spec = first.ready.spec
        node = self._fleet.nodes[lease.slot.node_id]
        node.assignments += 1
        lease.sequence = node.assignments
        return Assign(
            session_id=node.session_id,
            lease_id=lease.lease_id,
            sequence=lease.sequence,
            slot=lease.slot.slot_id,
            tenant=lease.tenant,
            function=spec.function,
            attempts=tuple(
                AttemptInputs(t.ready.run_id, t.ready.spec.task_id, t.attempt, t.inputs) for t in lease.tasks
            ),
            is_batched=spec.batch is not None,
            outputs=spec.outputs,
            split_outputs=first.ready.split_outputs,
            isolation=spec.isolation,
            resources=spec.resources,
            gpu_indices=lease.slot.gpu_indices,
            timeout_s=spec.attempt_timeout_s,
            after_lease_id="" if first.follows is None else lease.after_lease_id,
        )

    def check(self) -> None:
        """Assert what must hold between leases, slots and limits."""
        counted: dict[str, int] = {}
        for node in self._fleet.nodes.values():
            for slot in node.slots.values():
                if slot.limit_key:
                    counted[slot.limit_key] = counted.get(slot.limit_key, 0) + 1
        assert counted == {key: calls.total() for key, calls in self.parallel.items()}, "a limit is miscounted"
        for key, running in counted.items():
            allowed = [*self.parallel[key], self.limits.get(key, running)]
            assert all(limit == 0 or running <= limit for limit in allowed[:-1]), f"{running} calls of {key} run"
            assert running <= allowed[-1], f"{running} calls of {key} run"
        held: dict[str, float] = {}
        ahead: dict[str, float] = {}
        for lease in self.leases.values():
            name, is_first = lease.tenant, next(iter(lease.slot.lease_ids)) == lease.lease_id
            if is_first:
                held[name] = held.get(name, 0.0) + lease.share
            else:
                ahead[name] = ahead.get(name, 0.0) + lease.share * lease.expected_s
        self.queue.clocks.check(held, ahead)
        for lease in self.leases.values():
            policy = lease.tasks[0].ready.spec.batch
            assert len(lease.tasks) <= (1 if policy is None else policy.max_size), "a batch is too large"

    def _revoke(self, slot: Slot) -> None:
        """Revoke what waits behind the first lease of a slot."""
        session_id = self._fleet.nodes[slot.node_id].session_id
        for lease_id in list(slot.lease_ids)[1:]:
            lease = self.leases[lease_id]
            # What follows another task cannot run sooner elsewhere.
            follows = any(task.follows is not None for task in lease.members())
            if lease.started_at is None and not lease.is_revoked and not follows:
                lease.is_revoked = True
                self._emit(RevokeLease(session_id, lease_id))

    def _launch(self, collector: BatchCollector, now: float) -> bool:
        shape = collector.group.shape
        if self.limit_reached(shape) is not None:
            return self._send_ahead(collector)
        found = self._find(collector)
        if found is None:
            return self._send_ahead(collector)
        node, devices = found
        number = next(self._numbers)
        slot = Slot(
            number,
            node.node_id,
            shape.resources,
            shape.is_async,
            devices,
            limit_key=shape.limit_key,
            progress_at=now,
            is_exclusive=shape.is_exclusive,
        )
        node.take(slot)
        self._running.setdefault(shape, {})[number] = slot
        if shape.limit_key:
            self.parallel.setdefault(shape.limit_key, Counter())[shape.max_parallel] += 1
            self._reopen(collector)
        batch = collector.next_batch()
        self.keeping.unblock(collector)
        expected_s = self.expected_s(batch[0])
        # Nothing is sent behind what may take any time.
        self._assign(batch, slot, 2 * SEND_AHEAD_S if expected_s is None else expected_s)
        if len(batch) == 1:
            self.send_along(batch[0])
        return True

    def _find(self, collector: BatchCollector) -> tuple[Node, tuple[int, ...]] | None:
        """Return a node that is free for a line and the devices to use there; None when there is none."""
        shape, own = collector.group.shape, self.keeping.node_of(collector)
        kind, full = self._fleet.kind(shape), self._round.full
        if kind not in full:
            found = place(shape, self._fleet.nodes.values(), self.keeping.reserved(collector), self._fleet.suits)
            if found is None:
                full.add(kind)
            return found
        # When nothing is free for others of its kind, only what is kept for itself can be.
        return None if own is None else place(shape, [self._fleet.nodes[own]], suits=self._fleet.suits)

    def _reopen(self, collector: BatchCollector) -> None:
        """Look again at what shares its limit with a line of which a call starts; what it goes before is passed."""
        limit_key, entry = collector.group.shape.limit_key, collector.entry
        for other in self.queue.keys[limit_key].parked:
            if other.lane.stage is Stage.WAITING and other.entry is not None and entry is not None:
                other.was_passed = other.was_passed or other.entry < entry
        self.queue.reopen(limit_key)

    def _send_ahead(self, collector: BatchCollector) -> bool:
        shape, head = collector.group.shape, collector.head()
        if shape.is_async or shape.is_exclusive or collector.group.policy is not None or head is None:
            return False
        expected_s = self.expected_s(head)
        slots = self._running.get(shape)
        if not slots or expected_s is None or expected_s > SEND_AHEAD_S:
            return False
        # Whether there is room behind what runs is a matter of time as well.
        self._round.is_settled = False
        slot = min(slots.values(), key=lambda s: (self._is_long(s), s.backlog_s, len(s.lease_ids)))
        node = self._fleet.nodes[slot.node_id]
        if (
            self._is_long(slot)
            or not self._has_room(slot, expected_s)
            or not (node.takes_work and self._fleet.suits(shape, node))
        ):
            return False
        # A slot that always has something behind it is never free for whoever is earlier in turn.
        keeper = self.keeping.kept_for(node)
        if keeper not in {None, collector}:
            return False
        if any(self._fleet.could_run(earlier.group.shape, node) for earlier in self._round.blocked):
            return False
        self._assign([head], slot, expected_s)
        self._crowded[slot.slot_id] = slot
        return True

    def _has_room(self, slot: Slot, expected_s: float) -> bool:
        """Whether more may be sent behind what a slot has."""
        is_shared = len(self.queue.tenants) > 1 or self._placed_at < self._shared_at + SHARED_FOR_S
        limit_s = SHARED_AHEAD_S if is_shared else SEND_AHEAD_S
        return slot.backlog_s + expected_s <= limit_s and len(slot.lease_ids) < SEND_AHEAD_LEASES

    def _is_long(self, slot: Slot) -> bool:
        """Whether the attempt in front takes, or took already, longer than what is behind it should wait."""
        return slot.is_slow or self._placed_at >= slot.progress_at + PATIENCE_S

    def _assign(self, tasks: list[Task], slot: Slot, expected_s: float) -> None:
        self.look_again()
        first = tasks[0]
        after_lease_id = "" if first.follows is None else first.follows.lease_id
        share, tenant, now = self._fleet.share(first.shape), first.ready.tenant, self._placed_at
        lease_id = f"{self._epoch}-{next(self._numbers)}"
        lease = Lease(lease_id, list(tasks), slot, expected_s, first.shape, tenant, share, now, after_lease_id)
        for task in tasks:
            self.queue.discard(task)
            task.attempt += 1
            task.lease_id = lease_id
        if slot.lease_ids:
            self.queue.clocks.send_ahead(tenant, share * expected_s, now)
        else:
            self.queue.clocks.hold(tenant, share, now)
        if tenant != self._last_tenant:
            self._last_tenant, self._shared_at = tenant, now
        self.leases[lease_id] = lease
        slot.lease_ids[lease_id] = len(tasks)
        slot.backlog_s += expected_s
        self._emit(self.assignment(lease))

    def _free(self, slot: Slot, shape: Shape) -> None:
        self._fleet.nodes[slot.node_id].release(slot)
        if shape.limit_key:
            calls = self.parallel[shape.limit_key]
            calls[shape.max_parallel] -= 1
            # Unary plus drops what is at zero: its limit no longer counts.
            self.parallel[shape.limit_key] = +calls
            if not self.parallel[shape.limit_key]:
                del self.parallel[shape.limit_key]
            self.queue.reopen(shape.limit_key)
        running = self._running[shape]
        del running[slot.slot_id]
        if not running:
            del self._running[shape]
