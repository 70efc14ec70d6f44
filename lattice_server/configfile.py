"""Reads `lattice start --config FILE` and the environment. Rule: an unknown key, or a value out of bounds, is an error.

max_open_tasks = 100_000          # any number or text of `ServerConfig`, by its name

[limits]                          # concurrent calls, by concurrency key
openai = 8

[[batch]]                         # batching of tasks by name; the first rule that matches applies
match = "prefix"                  # or "exact", "regex"
pattern = "embed"
max_size = 32
max_wait_s = 0.05

A variable `LATTICE_MAX_OPEN_TASKS` sets the key `max_open_tasks`, and overrides the file.
"""

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lattice_server.config import Bounds, ServerConfig
from lattice_server.core.scheduling.batching import BatchRule, NameMatch

KINDS = {int: "a whole number from 0", float: "a number from 0", str: "a text"}
ANY = Bounds()
KEYS: dict[str, tuple[Any, Bounds]] = {
    setting.name: (setting.type, setting.metadata.get("bounds", ANY))
    for setting in fields(ServerConfig)
    if setting.type in KINDS and not setting.metadata.get("bounds", ANY).is_flag
}
RULE_KEYS = frozenset({"match", "pattern", "max_size", "max_wait_s"})
PREFIX = "LATTICE_"


class ConfigError(Exception):
    """A key or a value is wrong; the message names the key."""


def read_config(text: str, environment: Mapping[str, str] | None = None) -> ServerConfig:
    """Return the configuration of a file and an environment, with defaults for the rest. Raises ConfigError."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(error)) from None
    settings: dict[str, Any] = {
        "limits": _limits(found.pop("limits", {})),
        "batch_rules": _rules(found.pop("batch", [])),
    }
    for key, value in found.items():
        if key not in KEYS:
            raise ConfigError(f"there is no setting {key!r}; there are limits, batch, {', '.join(sorted(KEYS))}")
        settings[key] = _checked(key, key, value)
    for key, (kind, _) in KEYS.items():
        name = f"{PREFIX}{key.upper()}"
        if environment and (given := environment.get(name)):
            settings[key] = _checked(key, name, _parsed(kind, given))
    return ServerConfig(**settings)


def _parsed(kind: Any, text: str) -> Any:
    """Return the value of a variable, or its text when it has another kind, which `_checked` refuses."""
    try:
        return kind(text)
    except ValueError:
        return text


def _checked(key: str, name: str, value: Any) -> Any:
    """Return the value of a setting. Raises ConfigError, which names it by `name`, when it is out of bounds."""
    kind, bounds = KEYS[key]
    is_kind = isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
    if not is_kind or (kind is not str and not 0 <= value < math.inf):
        raise ConfigError(f"{name} must be {KINDS[kind]}, not {value!r}")
    if bounds.choices and value not in bounds.choices:
        raise ConfigError(f"{name} must be one of {', '.join(bounds.choices)}, not {value!r}")
    if kind is str:
        return value
    if value < bounds.least:
        raise ConfigError(f"{name} must be from {bounds.least}: clients may send that much")
    if value > bounds.most and not bounds.is_positive:
        raise ConfigError(f"{name} must be at most {bounds.most}, not {value!r}")
    if bounds.is_positive and not 0 < value <= bounds.most:
        limit = f" and at most {bounds.most}" if bounds.most < math.inf else ""
        raise ConfigError(f"{name} must be above 0{limit}, not {value!r}")
    return value


def _limits(found: Any) -> dict[str, int]:
    if not isinstance(found, dict):
        raise ConfigError("limits must be a table of numbers by name")
    for name, limit in found.items():
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ConfigError(f"limits.{name} must be a whole number from 1, not {limit!r}")
    return found


def _rules(found: Any) -> tuple[BatchRule, ...]:
    if not isinstance(found, list) or not all(isinstance(rule, dict) for rule in found):
        raise ConfigError("batch must be a list of tables, each under [[batch]]")
    return tuple(_rule(rule, f"batch[{index}]") for index, rule in enumerate(found))


def _rule(found: dict[str, Any], where: str) -> BatchRule:
    if wrong := found.keys() ^ RULE_KEYS:
        raise ConfigError(f"{where} must have {', '.join(sorted(RULE_KEYS))}; look at {', '.join(sorted(wrong))}")
    try:
        match = NameMatch(found["match"])
    except ValueError:
        raise ConfigError(f"{where}.match must be one of {', '.join(m.value for m in NameMatch)}") from None
    pattern, size, wait_s = found["pattern"], found["max_size"], found["max_wait_s"]
    if not isinstance(pattern, str):
        raise ConfigError(f"{where}.pattern must be a text")
    if match is NameMatch.REGEX:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{where}.pattern is no regular expression: {error}") from None
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigError(f"{where}.max_size must be a whole number from 1, not {size!r}")
    if not isinstance(wait_s, int | float) or isinstance(wait_s, bool) or not 0 <= wait_s < math.inf:
        raise ConfigError(f"{where}.max_wait_s must be a number from 0, not {wait_s!r}")
    return BatchRule(match, pattern, size, float(wait_s))
