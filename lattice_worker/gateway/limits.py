"""What providers tell of their limits in the headers of an answer. Rule: a header that is not understood tells nothing.

OpenAI and many others have `x-ratelimit-remaining-requests`, `x-ratelimit-reset-requests` and the same for tokens, with
durations such as `6m0s`. Anthropic has `anthropic-ratelimit-requests-remaining` and `-reset`, with times.
"""

import math
import re
from collections.abc import Mapping
from datetime import datetime

KINDS = ("requests", "tokens")
FORMS = (
    ("x-ratelimit-remaining-{}", "x-ratelimit-reset-{}"),
    ("anthropic-ratelimit-{}-remaining", "anthropic-ratelimit-{}-reset"),
)
UNITS_S = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
PART = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)(ms|[dhms])")
DIGITS = re.compile(r"[0-9]{1,15}")
DURATION = re.compile(rf"(?:{PART.pattern})+")


def told_limits(headers: Mapping[str, str], now: float) -> dict[str, list[float]]:
    """Return how many requests and tokens are left, and in how many seconds all are: by kind, as far as it is told.

    The names of headers are in lower case. `now` is the wall time, for resets that are told as a time.
    """
    found: dict[str, list[float]] = {}
    for kind in KINDS:
        for remaining, reset in FORMS:
            left = headers.get(remaining.format(kind), "").strip()
            reset_s = seconds(headers.get(reset.format(kind), "").strip(), now)
            if DIGITS.fullmatch(left) and reset_s is not None:
                found[kind] = [int(left), reset_s]
    return found


def seconds(text: str, now: float) -> float | None:
    """Return the seconds of a duration such as `1m2.5s`, of a number of seconds or of a time; None for another text."""
    if DURATION.fullmatch(text):
        return sum(float(number) * UNITS_S[unit] for number, unit in PART.findall(text))
    try:
        found = float(text)
    except ValueError:
        try:
            found = datetime.fromisoformat(text).timestamp() - now
        except ValueError:
            return None
    return max(0.0, found) if math.isfinite(found) else None
