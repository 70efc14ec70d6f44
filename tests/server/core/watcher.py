"""A model of the scheduler's machine that is compared with it at every step."""

from collections import Counter
from collections.abc import Iterable, Mapping
from math import ceil, log2

from lattice_server.core.messages import (
    Assign,
    SchedulerEffect,
    TaskCancelled,
    TaskFailed,
    TaskReady,
    TaskRetrying,
    TaskReturned,
    TaskStarted,
    TaskSucceeded,
)
from lattice_server.core.model import FailureKind, OutputRef, Resources
from lattice_server.core.scheduling.lease_table import Lease
from lattice_server.core.scheduling.nodes import Node
from lattice_server.core.scheduling.scheduler import Scheduler

Key = tuple[str, str]
CLOSE = 1e-6


class Watcher:
    """Follows every task to its end. `gone` are tasks that were returned or forgotten with the task they followed."""

    def __init__(self, machine: Scheduler, limits: Mapping[str, int] | None = None) -> None:
        self.machine = machine
        self.limits = limits or {}
        self.submitted: dict[Key, TaskReady] = {}
        self.offered: list[Assign] = []
        self.ended: dict[Key, SchedulerEffect] = {}
        self.gone: set[Key] = set()
        self.starts: Counter[Key] = Counter()
        self.lost: Counter[Key] = Counter()
        self._running: set[Key] = set()
        self._leases: dict[str, Assign] = {}

    def submit(self, ready: TaskReady) -> TaskReady:
        """Note that a task is handed over."""
        key = ready.run_id, ready.spec.task_id
        self.submitted[key] = ready
        if ready.earlier is not None:
            self._running.add(key)
        return ready

    def take(self, effects: Iterable[SchedulerEffect]) -> None:
        """Take the effects of a step. Call it before the next step."""
        for effect in effects:
            match effect:
                case Assign():
                    self._take_assignment(effect)
                case TaskStarted():
                    key = self._open(effect)
                    assert key not in self._running, f"{key} started twice"
                    self._running.add(key)
                    self.starts[key] += 1
                case TaskRetrying():
                    key = self._open(effect)
                    assert key in self._running, f"{key} is tried again before it was tried"
                    self._running.remove(key)
                    self.lost[key] += effect.failure.kind is FailureKind.WORKER_LOST
                case TaskSucceeded():
                    key = self._open(effect)
                    assert key in self._running, f"{key} succeeded before it started"
                    source = (key[0], self.submitted[key].after)
                    assert not source[1] or isinstance(self.ended[source], TaskSucceeded), f"{key} had no input"
                    self.ended[key] = effect
                case TaskFailed() | TaskCancelled():
                    self._take_failure(effect)
                case TaskReturned():
                    assert self.submitted[effect.run_id, effect.task_id].after
                    self.gone.add((effect.run_id, effect.task_id))
                case _:
                    pass

    def _open(self, effect: TaskStarted | TaskRetrying | TaskSucceeded) -> Key:
        key = (effect.run_id, effect.task_id)
        assert key in self.submitted
        assert key not in self.ended, f"{key} goes on after its end"
        return key

    def _take_failure(self, effect: TaskFailed | TaskCancelled) -> None:
        key = (effect.run_id, effect.task_id)
        assert key not in self.ended, f"{key} ended twice"
        # A follower in a lease ends cancelled once its worker returns it.
        if key in self.gone:
            return
        self.ended[key] = effect
        frontier = [key]
        while frontier:
            run_id, source = frontier.pop()
            for follower, ready in self.submitted.items():
                if follower[0] == run_id and ready.after == source and follower not in self.gone | self.ended.keys():
                    self.gone.add(follower)
                    frontier.append(follower)

    def _take_assignment(self, assign: Assign) -> None:
        self.offered.append(assign)
        members = [self.submitted[a.run_id, a.task_id] for a in assign.attempts]
        first = members[0].spec
        known = self._leases.setdefault(assign.lease_id, assign)
        same = [(a.run_id, a.task_id, a.attempt) for a in assign.attempts]
        assert same == [(a.run_id, a.task_id, a.attempt) for a in known.attempts], "a lease was handed out twice"
        assert len({a.task_id + a.run_id for a in assign.attempts}) == len(assign.attempts)
        assert len(members) <= (first.batch.max_size if first.batch else 1), "a batch is too large"
        for member in members:
            spec = member.spec
            assert (spec.function, spec.resources, spec.batch) == (first.function, first.resources, first.batch)
            assert (spec.outputs, spec.attempt_timeout_s) == (assign.outputs, assign.timeout_s)
            assert (member.tenant, member.split_outputs) == (members[0].tenant, assign.split_outputs)
            if first.batch and first.batch.scope.value == "run":
                assert member.run_id == members[0].run_id
        refers = any(isinstance(binding, OutputRef) for a in assign.attempts for binding in a.inputs.values())
        assert assign.after_lease_id or not refers, "a lease does not say where its inputs come from"
        if assign.after_lease_id:
            source = self._leases[assign.after_lease_id]
            assert (source.session_id, source.slot, len(source.attempts)) == (assign.session_id, assign.slot, 1)
            assert source.attempts[0].task_id == members[0].after
        node = next((n for n in self.machine.nodes.values() if n.session_id == assign.session_id), None)
        if node is not None and known is assign:
            assert node.takes_work, "a node that takes nothing was given something"
            assert all(node.spec.labels.get(key) == value for key, value in first.node_selector)
            is_python = first.function.entrypoint in {"", "package:call"}
            has_code = first.function.entrypoint in node.spec.entrypoints if node.spec.entrypoints else is_python
            assert has_code, "a worker was given what it cannot call"
            assert first.function.runtime.admits(node.spec.runtime)

    def check(self, now: float) -> None:
        """Assert the invariants; call it after every step."""
        self.machine.check()
        at = self.machine.next_deadline()
        assert at is None or at > now, "something is due, and was not done"
        known = set(self.machine.tasks)
        assert known | set(self.ended) | self.gone == set(self.submitted), "a task was lost"
        assert not known & set(self.ended)
        assert all(self.machine.tasks[key].ending for key in known & self.gone)
        for node in self.machine.nodes.values():
            self._check_node(node)
        self._check_limits()
        for key, starts in self.starts.items():
            ready = self.submitted[key]
            halvings = ceil(log2(ready.spec.batch.max_size)) + 1 if ready.spec.batch else 0
            # The number of lost workers is not bounded, nor that of returned leases; that of charges is.
            tries = ready.spec.retry.max_attempts * (halvings + 1)
            assert starts - self.lost[key] <= tries + 1, f"{key} is tried without end"

    def _check_node(self, node: Node) -> None:
        slots: dict[int, Lease] = {}
        for lease in self.machine.leases.values():
            if lease.slot.node_id == node.node_id and not lease.slot.is_over:
                slots[lease.slot.slot_id] = lease
        held = [(lease.tasks[0].ready.spec, lease.slot.gpu_indices) for lease in slots.values()]
        assert sum(spec.resources.cpu for spec, _ in held) <= node.spec.capacity.cpu + CLOSE
        assert sum(spec.resources.memory_bytes for spec, _ in held) <= node.spec.capacity.memory_bytes
        assert sum(not spec.function.is_async for spec, _ in held) <= node.spec.capacity.slots
        assert sum(spec.function.is_async for spec, _ in held) <= node.spec.capacity.async_slots
        on_device: dict[int, list[Resources]] = {gpu.index: [] for gpu in node.spec.capacity.gpus}
        for spec, indices in held:
            wanted = spec.resources
            count = int(wanted.gpu) if wanted.gpu >= 1 else int(wanted.gpu > 0 or wanted.gpu_memory_bytes > 0)
            assert len(set(indices)) == len(indices) == count
            for index in indices:
                on_device[index].append(wanted)
        for gpu in node.spec.capacity.gpus:
            sharing = on_device[gpu.index]
            assert sum(min(1.0, wanted.gpu) for wanted in sharing) <= 1 + CLOSE
            assert sum(wanted.gpu_memory_bytes for wanted in sharing) <= gpu.memory_bytes
            assert len(sharing) <= 1 or all(wanted.gpu < 1 for wanted in sharing), "a whole device is shared"

    def _check_limits(self) -> None:
        calls: dict[str, dict[int, int]] = {}
        for lease in self.machine.leases.values():
            if lease.slot.is_over:  # Its attempts have ended before the server was started; only their reports come.
                continue
            spec = lease.tasks[0].ready.spec
            name = spec.concurrency_key or (spec.function.digest if spec.max_parallel else "")
            if name:
                calls.setdefault(name, {})[lease.slot.slot_id] = spec.max_parallel
        for name, found in calls.items():
            allowed = [limit for limit in (*found.values(), self.limits.get(name, 0)) if limit]
            assert len(found) <= min(allowed, default=len(found)), f"too many calls of {name}"
