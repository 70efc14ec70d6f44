"""Masks secrets in what attempts and services write. Rule: a secret is masked also when it comes in pieces.

Masked is a secret as it is, as JSON, as Python shows it, as a part of a URL and in base64; of a secret with several
lines also each line. A form of fewer than `MIN_SECRET` characters is not: it occurs by chance in harmless text.
"""

import base64
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import quote

from lattice.v1 import worker_pb2

MASK = "***"
MIN_SECRET = 8
Log = Callable[[str, str, bool], None]  # Takes a stream, a text, and whether text was cut.


def masked_forms(secrets: Iterable[str]) -> tuple[str, ...]:
    """Return the texts that show a secret, the longest first."""
    forms: set[str] = set()
    for secret in secrets:
        for part in {secret, *secret.splitlines()}:
            if len(part) >= MIN_SECRET:
                forms |= {part, json.dumps(part)[1:-1], quote(part, safe=""), repr(part)[1:-1]}
                forms |= _in_base64(part.encode(errors="replace"))
    return tuple(sorted(forms, key=len, reverse=True))


def _in_base64(data: bytes) -> set[str]:
    """Return the characters that stand for all of some bytes and nothing else, wherever they lie in a longer text."""
    found = set()
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + data).decode()
        first, end = (0, 2, 3)[before], (before + len(data)) * 8 // 6
        inner = encoded[first:end]
        found |= {inner, inner.replace("+", "-").replace("/", "_")}
    return {form for form in found if len(form) >= MIN_SECRET}


class Masker:
    """Masks the secrets of one lease."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._forms = masked_forms(secrets)
        self._encoded = [form.encode(errors="replace") for form in self._forms]
        self._held: dict[str, str] = defaultdict(str)  # By stream: an end that may be the beginning of a secret.

    @classmethod
    def of(cls, assignment: worker_pb2.Assignment) -> "Masker | None":
        """Return the masker of a lease; None when it has no secrets."""
        names = assignment.secret_variables
        return cls(assignment.environment[name] for name in names) if names else None

    def text(self, text: str) -> str:
        """Return a text without secrets."""
        for form in self._forms:
            text = text.replace(form, MASK)
        return text

    def value(self, value: Any) -> Any:
        """Return a value of JSON in which no text has a secret."""
        match value:
            case str():
                masked = self.text(value)
                # The text may have been cut in the middle of a secret.
                begun = self._open_end(masked)
                return masked if begun < MIN_SECRET else masked[:-begun] + MASK
            case list() | tuple():
                return [self.value(item) for item in value]
            case dict():
                return {self.value(key): self.value(item) for key, item in value.items()}
            case _:
                return value

    def log(self, log: Log, stream: str, text: str, is_truncated: bool) -> None:
        """Pass text on to `log`. An end that may be the beginning of a secret waits for the next text."""
        masked = self.text(self._held[stream] + text)
        kept = 0 if is_truncated else self._open_end(masked)
        self._held[stream] = masked[len(masked) - kept :]
        if shown := masked[: len(masked) - kept]:
            log(stream, shown, is_truncated)

    def release(self, log: Log) -> None:
        """Pass the ends that wait on to `log`: no more text comes."""
        held, self._held = self._held, defaultdict(str)
        for stream, text in held.items():
            if text:
                log(stream, text, False)

    def answer(self, answer: dict[str, Any], blobs: list[bytes]) -> dict[str, Any]:
        """Return the answer of an attempt without secrets in its failure. An exception that holds one is left out."""
        if "items" in answer and isinstance(answer["items"], list):
            members = [self._member(found, blobs) if isinstance(found, dict) else found for found in answer["items"]]
            return {**answer, "items": members}
        return self._member(answer, blobs)

    def _member(self, answer: dict[str, Any], blobs: list[bytes]) -> dict[str, Any]:
        failure = answer.get("failure")
        if not isinstance(failure, dict):
            return answer
        exception = failure.get("exception")
        if isinstance(exception, int) and any(form in blobs[exception] for form in self._encoded):
            failure = {name: found for name, found in failure.items() if name != "exception"}
        return {**answer, "failure": self.value(failure)}

    def _open_end(self, text: str) -> int:
        """Return the length of the longest end of a text that a secret begins with."""
        longest = min(len(text), max(map(len, self._forms), default=1) - 1)
        for start in range(len(text) - longest, len(text)):
            if any(form.startswith(text[start : start + 1]) and form.startswith(text[start:]) for form in self._forms):
                return len(text) - start
        return 0
