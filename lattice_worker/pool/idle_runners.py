"""The runners that have served a key and run nothing now, in the order of their last use."""

from lattice_worker.pool.invocation import RunnerKey
from lattice_worker.pool.runner_handle import Runner


class IdleRunners:
    """Idle runners. Async runners count too; they are found by `SharedRunners`."""

    def __init__(self) -> None:
        self._in_order: dict[Runner, None] = {}  # Least recently used first.
        self._by_key: dict[RunnerKey, list[Runner]] = {}

    def __len__(self) -> int:
        return len(self._in_order)

    def add(self, runner: Runner) -> None:
        """Add a runner as the most recently used one."""
        self._in_order[runner] = None
        if not runner.key.is_async:
            self._by_key.setdefault(runner.key, []).append(runner)

    def remove(self, runner: Runner) -> None:
        """Remove a runner, if it is here."""
        if runner in self._in_order:
            del self._in_order[runner]
            same = self._by_key.get(runner.key, [])
            if runner in same:
                same.remove(runner)
            if not same:
                self._by_key.pop(runner.key, None)

    def take(self, key: RunnerKey) -> Runner | None:
        """Remove and return the most recently used runner of a key: its memory is in the caches."""
        while same := self._by_key.get(key):
            runner = same[-1]
            self.remove(runner)
            if runner.is_fit:
                return runner
        return None

    def take_oldest(self) -> Runner:
        """Remove and return the least recently used runner."""
        oldest = next(iter(self._in_order))
        self.remove(oldest)
        return oldest

    def check(self) -> None:
        """Assert that both orders have the same runners."""
        by_key = [runner for same in self._by_key.values() for runner in same]
        assert sorted(map(id, by_key)) == sorted(id(runner) for runner in self._in_order if not runner.key.is_async)

    def all(self) -> list[Runner]:
        """Return all idle runners, the least recently used first."""
        return list(self._in_order)
