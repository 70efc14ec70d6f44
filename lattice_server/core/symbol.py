"""The base of enumerations. Rule: finding a member in a set or a dict runs no Python code."""

from enum import Enum


class Symbol(Enum):
    """An enumeration whose members are hashed by identity, as each is the only object of its value.

    `Enum` hashes the name of a member, by a Python function, and several are looked up for each event.
    """

    __hash__ = object.__hash__
