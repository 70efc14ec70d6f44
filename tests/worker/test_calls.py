"""How a batched function is called: one list for each keyword, with any members."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from lattice_worker.runner.encoding.values import PayloadError
from lattice_worker.runner.invocation.calls import columns


def scale(x: Any, k: Any = 5, *, unit: Any = "m") -> Any: ...
def anything(x: Any, **more: Any) -> Any: ...


@pytest.mark.parametrize(
    ("function", "batch", "found"),
    [
        (scale, [{"x": 1}], {"x": [1], "k": [5], "unit": ["m"]}),
        (scale, [{"x": 1}, {"k": 9, "x": 2}], {"x": [1, 2], "k": [5, 9], "unit": ["m", "m"]}),
        (functools.partial(scale, k=3), [{"x": 1}, {"x": 2}], {"x": [1, 2], "unit": ["m", "m"]}),
        (functools.partial(functools.partial(scale, unit="s"), k=3), [{"x": 1}], {"x": [1]}),
        (anything, [{"x": 1, "z": 1, "b": 2}, {"b": 3, "x": 4, "z": 5}], {"x": [1, 4], "b": [2, 3], "z": [1, 5]}),
        (min, [{"a": 1}, {"a": 2}], {"a": [1, 2]}),
    ],
)
def test_a_batch_has_a_list_for_each_parameter(
    function: Callable[..., Any], batch: list[dict[str, Any]], found: dict[str, Any]
) -> None:
    assert list(columns(function, batch).items()) == list(found.items())


def test_a_batch_is_refused_when_a_member_gives_a_bound_input() -> None:
    with pytest.raises(PayloadError, match=r"input 'k' is bound for the whole batch by functools\.partial"):
        columns(functools.partial(scale, k=3), [{"x": 1}, {"x": 2, "k": 4}])


def test_a_batch_in_which_a_needed_input_is_missing_is_refused() -> None:
    with pytest.raises(PayloadError, match="some members of the batch have no input 'b'"):
        columns(anything, [{"x": 1, "b": 1}, {"x": 2}])
