"""Owns whether a condition is met. Rule: of all values only these are read, and as JSON only."""

import json

from lattice_server.core.model import Condition

# What Python, JavaScript and shells agree to call false.
FALSE = frozenset({"false", "null", "0", '""', "[]", "{}"})


def is_met(condition: Condition, text: str) -> bool:
    """Whether a value, as JSON, meets a condition. What is no JSON after all is true, and equal to nothing else."""
    found = _canonical(text) not in FALSE
    if condition.equals is not None:
        assert isinstance(condition.equals.content, str), "the graph was validated"
        found = _canonical(text) == _canonical(condition.equals.content)
    return found is not condition.is_negated


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
