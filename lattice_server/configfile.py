"""Owns the reading of `lattice start --config FILE`. Rule: an unknown key is an error.

max_open_tasks = 100_000          # any number or text of `ServerConfig`, by its name

[limits]                          # concurrent calls, by concurrency key
openai = 8

[[batch]]                         # batching of tasks by name; the first rule that matches applies
match = "prefix"                  # or "exact", "regex"
pattern = "embed"
max_size = 32
max_wait_s = 0.05
"""

import math
import re
import tomllib
from dataclasses import fields
from typing import Any

from lattice_server import logs
from lattice_server.config import MIN_INLINE_BYTES, MIN_MESSAGE_BYTES, MIN_MESSAGE_TASKS, ServerConfig
from lattice_server.core.scheduling.batching import BatchRule, NameMatch

PLAIN = {found.name: found.type for found in fields(ServerConfig) if found.type in {int, float, str}}
FLAGS = frozenset({"host", "port", "executor", "node_ip", "ray_address", "ray_workers"})
KINDS = {int: "a whole number from 0", float: "a number from 0", str: "a text"}
# Minima that the contract promises; see `Limits`.
LEAST = {
    "inline_limit_bytes": MIN_INLINE_BYTES,
    "message_limit_bytes": MIN_MESSAGE_BYTES,
    "message_limit_tasks": MIN_MESSAGE_TASKS,
}
CHOICES = {"log_format": logs.FORMATS, "log_level": logs.LEVELS}
RULE_KEYS = frozenset({"match", "pattern", "max_size", "max_wait_s"})


class ConfigError(Exception):
    """A key or a value of the file is wrong; the message names the key."""


def read_config(text: str) -> ServerConfig:
    """Return the configuration of a file, with defaults for the other keys. Raises ConfigError."""
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(str(error)) from None
    settings: dict[str, Any] = {
        "limits": _limits(found.pop("limits", {})),
        "batch_rules": _rules(found.pop("batch", [])),
    }
    for key, value in found.items():
        kind = PLAIN.get(key)
        if kind is None or key in FLAGS:
            known = ", ".join(sorted(PLAIN.keys() - FLAGS))
            raise ConfigError(f"there is no setting {key!r}; there are limits, batch, {known}")
        is_right = isinstance(value, kind | int if kind is float else kind) and not isinstance(value, bool)
        if not is_right or (isinstance(value, int | float) and not 0 <= value < math.inf):
            raise ConfigError(f"{key} must be {KINDS[kind]}, not {value!r}")
        if value < (least := LEAST.get(key, value)):
            raise ConfigError(f"{key} must be from {least}: clients may send that much")
        if key == "session_ttl_s" and not value:
            raise ConfigError(f"{key} must be above 0: every worker would be lost at once")
        if key == "tenant_share" and not 0 < value <= 1:
            raise ConfigError(f"{key} must be above 0 and at most 1, not {value!r}")
        if value not in CHOICES.get(key, (value,)):
            raise ConfigError(f"{key} must be one of {', '.join(CHOICES[key])}, not {value!r}")
        settings[key] = value
    return ServerConfig(**settings)


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
