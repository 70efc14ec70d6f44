"""The children of a process, as the kernel lists them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lattice_worker.runner.surroundings import process_tree


def test_a_child_that_the_kernel_left_out_once_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    listings = iter([[1], [2, 3], [2, 3], [4]])
    monkeypatch.setattr(process_tree, "_listed_children", lambda pid: next(listings))
    assert process_tree.children_of(7) == [2, 3]


def test_a_process_whose_children_always_change_is_listed_a_bounded_number_of_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listings = [[number] for number in range(1000)]
    monkeypatch.setattr(process_tree, "_listed_children", lambda pid: listings.pop(0))
    assert process_tree.children_of(7) == [process_tree.MAX_LISTINGS]


def test_a_process_that_ends_while_its_children_are_listed_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def vanish(self: Path, pattern: str) -> Iterator[Path]:
        yield self / "7" / "children"
        raise FileNotFoundError(str(self))

    monkeypatch.setattr(Path, "glob", vanish)
    assert process_tree.children_of(2**22 + 1) == []
