"""Owns work that is done in steps. Rule: a step is short, and the owner of the thread decides what happens between two.

Such work is a generator that yields after each step and returns what it made. Nothing else may see what it works on
before it has ended, unless its author says so.
"""

from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
# Of what is done once for each task: some tens of microseconds each.
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
