"""Owns the operator's rules that replace the batch policy of tasks, by name."""

import re
from collections.abc import Iterable
from dataclasses import replace

from lattice_server.core.frozen import frozen
from lattice_server.core.model import BatchPolicy
from lattice_server.core.symbol import Symbol


class NameMatch(Symbol):
    """How a rule's pattern is compared with a task's name."""

    EXACT = "exact"
    PREFIX = "prefix"
    REGEX = "regex"


@frozen
class BatchRule:
    """A size and a wait that replace those of batched tasks whose name the pattern fits."""

    match: NameMatch
    pattern: str
    max_size: int
    max_wait_s: float

    def fits(self, name: str) -> bool:
        """Whether the rule applies to a task of this name."""
        match self.match:
            case NameMatch.EXACT:
                return name == self.pattern
            case NameMatch.PREFIX:
                return name.startswith(self.pattern)
            case NameMatch.REGEX:
                return re.fullmatch(self.pattern, name) is not None


def by_rule(name: str, policy: BatchPolicy, rules: Iterable[BatchRule]) -> BatchPolicy:
    """Return the policy of a batched task: by the first rule that fits its name, or else its own."""
    rule = next((rule for rule in rules if rule.fits(name)), None)
    return policy if rule is None else replace(policy, max_size=rule.max_size, max_wait_s=rule.max_wait_s)
