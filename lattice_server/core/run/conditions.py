"""Owns whether a condition is met. Rule: a value is read as JSON."""

import json

from lattice_server.core.model import Condition, Path

# The JSON values that are false in Python, in JavaScript and in shells.
FALSE = frozenset({"false", "null", "0", '""', "[]", "{}"})


class PathError(Exception):
    """A value does not have the part that a path selects; the message says which."""


def is_met(condition: Condition, text: str) -> bool:
    """Whether a value, as JSON text, meets a condition. Invalid JSON is true, and equal only to the same text.

    Raises PathError when the condition selects a part that the value does not have.
    """
    if condition.output.path:
        text = _part_of(text, condition.output.path)
    found = _canonical(text) not in FALSE
    if condition.equals is not None:
        assert isinstance(condition.equals.content, str), "the graph was validated"
        found = _canonical(text) == _canonical(condition.equals.content)
    return found is not condition.is_negated


def _part_of(text: str, path: Path) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise PathError("it is not JSON that can be read here") from None
    for number, step in enumerate(path):
        is_fitting = isinstance(value, dict if isinstance(step, str) else list)
        try:
            if not is_fitting:
                raise LookupError
            value = value[step]
        except LookupError:
            raise PathError(f"it has no part {''.join(f'[{step!r}]' for step in path[: number + 1])}") from None
    return json.dumps(value)


def _canonical(text: str) -> str:
    """Return the same text for equal values: blanks, the order of keys and `8.0` for `8` make no difference."""
    try:
        return json.dumps(json.loads(text, parse_float=_number), sort_keys=True)
    except (ValueError, RecursionError):
        # Its worker does not write JSON, or it is nested too deeply.
        return text


def _number(text: str) -> float | int:
    number = float(text)
    return int(number) if number.is_integer() else number
