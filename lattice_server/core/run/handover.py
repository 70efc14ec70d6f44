"""Owns which tasks of a run are to be handed over, or to be stopped, and in which order. Part of `run`.

Rule: so many at once, and the rest later; what else happens to the run may happen in between.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from lattice_server.core.model import Failure

# Of the tasks that wait for one alone, how many are handed over before it ends: all of them go on at once when it does.
MAX_PROMISED = 500


class Handover:
    """What a run still has to hand over, or, once it stops, to stop.

    `added` are tasks that joined a run which had started, before their predecessors were looked at. `ready` are the
    tasks that wait for nothing. `stopping` are those that may have to be stopped, because of `cause`.
    Promises come before the next task that is ready: each is a stack of tasks, with the place of the first successor of
    each that was not looked at.
    """

    def __init__(self, slice_tasks: int | None) -> None:
        self.added: deque[str] = deque()
        self.ready: deque[str] = deque()
        self.stopping: deque[str] = deque()
        self.cause: Failure | None = None
        self._promises: deque[list[tuple[str, int]]] = deque()
        self._untouched: set[str] = set()  # The first tasks of promises that were not begun: one for each is enough.
        self._slice_tasks = slice_tasks
        self._left = 0

    @property
    def is_under_way(self) -> bool:
        """Whether there is more to hand over."""
        return bool(self.ready or self._promises or self.stopping or self.added)

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be handed over now."""
        return not self.is_under_way or (self._slice_tasks is not None and self._left <= 0)

    @property
    def is_promising(self) -> bool:
        """Whether promises come first."""
        return bool(self._promises)

    def begin(self) -> None:
        """Begin a slice."""
        self._left = self._slice_tasks or 0

    def next_added(self) -> str:
        """Take out a task that joined the run."""
        self._left -= 1
        return self.added.popleft()

    def next_ready(self) -> str:
        """Take out a task that waits for nothing."""
        self._left -= 1
        return self.ready.popleft()

    def promise(self, task_id: str) -> None:
        """Note that what waits for a task alone is handed over early, and what waits for that alone, and so on."""
        if task_id not in self._untouched:
            self._untouched.add(task_id)
            self._promises.append([(task_id, 0)])

    def keep_promises(self, successors: Mapping[str, Sequence[str]], hand_over: Callable[[str, str], bool]) -> None:
        """Hand over what waits for a task; `hand_over` is given the two and tells whether it did."""
        stack = self._promises[0]
        source, start = stack.pop()
        self._untouched.discard(source)
        waiting = successors[source][:MAX_PROMISED]
        end = len(waiting) if self._slice_tasks is None else min(len(waiting), start + max(1, self._left))
        handed_over = [successor for successor in waiting[start:end] if hand_over(source, successor)]
        self._left -= end - start
        stack += [(successor, 0) for successor in handed_over]
        if end < len(waiting):
            stack.append((source, end))
        if not stack:
            self._promises.popleft()

    def stop(self, task_ids: Iterable[str], cause: Failure) -> None:
        """Hand over nothing more; note the tasks that may have to be stopped."""
        self.clear()
        self.stopping.extend(task_ids)
        self.cause = cause

    def next_stopping(self) -> list[str]:
        """Take out some of the tasks that may have to be stopped."""
        count = len(self.stopping) if self._slice_tasks is None else min(self._left, len(self.stopping))
        self._left -= count
        return [self.stopping.popleft() for _ in range(count)]

    def clear(self) -> None:
        """Forget everything."""
        self.added.clear()
        self.ready.clear()
        self.stopping.clear()
        self._promises.clear()
        self._untouched.clear()
