"""How many generated examples tests run, and, for the worker, from which seed.

LATTICE_EXAMPLES is the percentage of all examples (2 by default, 5 in `make test-all`). LATTICE_SEED is the seed, by
default a new one, which is printed.
"""

import os
import random
from collections.abc import Callable
from typing import Any

import hypothesis

PERCENT = float(os.environ.get("LATTICE_EXAMPLES") or 2)
SEED = int(os.environ.get("LATTICE_SEED") or random.SystemRandom().randrange(2**32))


def share(full: int) -> int:
    """Return how many of a full run's examples are to be run now."""
    return max(1, round(full * PERCENT / 100))


def examples(full: int) -> Callable[[Any], Any]:
    """Have hypothesis run this share of `full` examples of a test, from the seed."""

    def decorate(test: Any) -> Any:
        chosen = hypothesis.settings(
            max_examples=share(full),
            deadline=None,
            database=None,
            print_blob=True,
            phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # Making them smaller takes minutes.
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        return hypothesis.seed(SEED)(chosen(test))

    return decorate
