"""Owns whether a condition is met. Rule: of all values only these are read, and as JSON only."""

import json

from lattice_server.core.model import Condition, Path

# What Python, JavaScript and shells agree to call false.
FALSE = frozenset({"false", "null", "0", '""', "[]", "{}"})


class PathError(Exception):
    """A value has no such part as a path names; the message is for people."""


def is_met(condition: Condition, text: str) -> bool:
    """Whether a value, as JSON, meets a condition. What is no JSON after all is true, and equal to nothing else.

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
        raise PathError("it is no JSON that can be read here") from None
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
    """Return one spelling of all that mean the same: blanks, the order of keys and `8.0` for `8` say nothing."""
    try:
        return json.dumps(json.loads(text, parse_float=_number), sort_keys=True)
    except (ValueError, RecursionError):
        # It came from a worker that writes no JSON, or nests deeper than anybody reads.
        return text


def _number(text: str) -> float | int:
    number = float(text)
    return int(number) if number.is_integer() else number
