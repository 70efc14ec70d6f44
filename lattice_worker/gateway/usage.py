"""How many tokens a request may use, estimated, and how many it did use. Rule: an estimate errs on the high side."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BYTES_PER_TOKEN = 4
FIRST_RATIO, FIRST_OUTPUT = 1.15, 1024
LEARNED = 50  # Answers.
HIGH = 0.9  # The part of the learned values that is no higher than the estimate.
IMAGE_TOKENS = 1000
MOST = 2**40  # More than any budget. Numbers beyond it are nonsense, and too large for some arithmetic.
TEXTS = frozenset({"messages", "prompt", "input", "instructions", "system", "tools", "functions", "response_format"})
OUTPUT_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
MANY_ANSWERS = ("n", "best_of")


@dataclass(frozen=True, slots=True)
class Estimate:
    """The tokens of a request before its answer; `prompt` is not corrected by earlier answers."""

    prompt: int
    tokens: int


@dataclass(slots=True)
class Usage:
    """The tokens that an answer used: the reported tokens, or else one for each chunk of a stream."""

    prompt: int | None = None
    output: int | None = None
    chunks: int = 0

    def note(self, body: Mapping[str, Any]) -> bool:
        """Take an answer, or an event of one; return whether it reports its use."""
        found = body.get("usage")
        if not isinstance(found, dict) and isinstance(response := body.get("response"), dict):
            found = response.get("usage")
        if not isinstance(found, dict):
            return False
        prompt, output = (_first(found, names) for names in (("prompt_tokens", "input_tokens"), OUTPUTS))
        if prompt is None:
            return False
        total = _first(found, ("total_tokens",))
        self.prompt = prompt
        self.output = output if output is not None else max(0, (total or prompt) - prompt)
        return True

    def tokens(self, estimate: Estimate) -> int | None:
        """Return how many tokens were used; None when nothing tells it."""
        if self.prompt is not None and self.output is not None:
            return self.prompt + self.output
        return estimate.prompt + self.chunks if self.chunks else None


OUTPUTS = ("completion_tokens", "output_tokens")


class Estimates:
    """Estimates the requests of one model by its earlier requests."""

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=LEARNED)
        self._outputs: deque[int] = deque(maxlen=LEARNED)

    def of(self, body: Mapping[str, Any], path: str, limit: int | None) -> Estimate:
        """Return an estimate. Without a maximum of its own the output is at most the rest of the `limit`."""
        prompt = sum(_size(body[name]) for name in TEXTS & body.keys())
        ratio = _high(self._ratios) if self._ratios else FIRST_RATIO
        tokens = math.ceil(prompt * ratio)
        if path.endswith("/embeddings"):
            return Estimate(prompt, tokens)
        most = _first(body, OUTPUT_LIMITS)
        if most is not None:
            many = max(1, *(_first(body, (name,)) or 1 for name in MANY_ANSWERS))
            return Estimate(prompt, min(tokens + most * many, MOST))
        usual = math.ceil(_high(self._outputs)) if self._outputs else FIRST_OUTPUT
        return Estimate(prompt, tokens + usual if limit is None else max(tokens, min(tokens + usual, limit)))

    def learn(self, estimate: Estimate, usage: Usage) -> None:
        """Learn from the usage of an answer."""
        if usage.prompt is not None and usage.output is not None:
            self._outputs.append(usage.output)
            if estimate.prompt:
                self._ratios.append(usage.prompt / estimate.prompt)


def _size(value: Any) -> int:
    """Return the tokens of the texts in a value of JSON, by their bytes."""
    match value:
        case str() if value.startswith("data:"):
            return IMAGE_TOKENS
        case str():
            return math.ceil(len(value.encode(errors="replace")) / BYTES_PER_TOKEN)
        case list():
            return len(value) if value and isinstance(value[0], int) else sum(map(_size, value))
        case dict():
            return sum(map(_size, value.values()))
        case _:
            return 0


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    found = (min(values[name], MOST) for name in names if type(values.get(name)) is int and values[name] >= 0)
    return next(found, None)


def _high(values: "deque[float] | deque[int]") -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * HIGH))]
