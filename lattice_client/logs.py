"""Owns the format of log lines. Rule: no text in a record begins a new line, contains a control character, or is long.

The argument `extra` of a logging call names the run, task, attempt, node, worker, session or lease of a record.
"""

import json
import logging
from datetime import UTC, datetime
from typing import TextIO

HANDLER = "lattice"
FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
FIELDS = ("run_id", "task_id", "attempt", "node_id", "worker_id", "session_id", "lease_id", "error_id", "trace_id")
# Characters. Collectors of logs split or drop lines of more than 16 KiB, such as one with a user's value in an error.
MAX_TEXT, MAX_FIELD = 8000, 256


def set_up(form: str = "text", level: str = "warning") -> logging.StreamHandler[TextIO]:
    """Write log records of this process from a level on to stderr, as text or as one JSON object a line."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root = logging.getLogger()
    # Only the handler of an earlier call, of any package, is replaced: the program may have handlers of its own.
    for earlier in [found for found in root.handlers if found.name == HANDLER]:
        root.removeHandler(earlier)
    handler.name = HANDLER
    root.addHandler(handler)
    root.setLevel(level.upper())
    return handler


class TextLines(logging.Formatter):
    """Records for people: fields follow the message, and the lines of a traceback are indented."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as text."""
        values = vars(record)
        fields = "".join(
            f" {name}={_word(_short(str(values[name]), MAX_FIELD))}" for name in FIELDS if values.get(name)
        )
        message = shown(_short(record.getMessage(), MAX_TEXT))
        text = f"{self.formatTime(record)} {record.levelname} {record.name}: {message}{fields}"
        if record.exc_info:
            lines = _short(self.formatException(record.exc_info), MAX_TEXT).splitlines()
            text += "".join(f"\n    {shown(line)}" for line in lines)
        return text


class JsonLines(logging.Formatter):
    """Records for programs: `time`, `level`, `logger`, `message`, `exception` and the fields, all in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one JSON object, without fields that have no value."""
        message = _short(record.getMessage(), MAX_TEXT)
        found: dict[str, object] = {"level": record.levelname, "logger": record.name, "message": message}
        if record.exc_info:
            found["exception"] = _short(self.formatException(record.exc_info), MAX_TEXT)
        told = vars(record)
        named = {name: told[name] for name in FIELDS if told.get(name)}
        found |= {name: _short(value, MAX_FIELD) if isinstance(value, str) else value for name, value in named.items()}
        found["time"] = datetime.fromtimestamp(record.created, UTC).isoformat()
        return json.dumps(found, default=str)


def shown(text: str) -> str:
    """Return text with an escape sequence in place of each character that is not printable."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _short(text: str, limit: int) -> str:
    """Return text of which the middle is left out when it is long."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} ... {len(text) - limit} characters left out ... {text[-(limit // 2) :]}"


def _word(text: str) -> str:
    return repr(text) if not text or " " in text or "=" in text else shown(text)
