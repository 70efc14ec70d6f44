"""Owns work in short steps, between which the thread can handle other events.

Rule: such work is a generator that yields after each step and returns its result. Until then, its data is not shared.
"""

from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
# The items of a step, of some tens of microseconds each.
STEP_ITEMS = 100


def finish(steps: Steps[T]) -> T:
    """Do all steps at once."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            found: T = done.value
            return found


def stepwise(items: Iterable[T], size: int = STEP_ITEMS) -> Iterator[tuple[T, bool]]:
    """Yield each item and whether a step ends with it."""
    for number, item in enumerate(items, 1):
        yield item, number % size == 0
