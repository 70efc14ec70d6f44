"""Owns how log lines look. Rule: a record is one line, and text of others neither begins a line nor steers a terminal.

A record says by `extra` which run, task, attempt, node, worker, session or lease it is about.
"""

import json
import logging
from datetime import UTC, datetime
from typing import TextIO

HANDLER = "lattice"
FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
FIELDS = ("run_id", "task_id", "attempt", "node_id", "worker_id", "session_id", "lease_id", "error_id")


def set_up(form: str = "text", level: str = "warning") -> logging.StreamHandler[TextIO]:
    """Write the log of this process to stderr, as text or as one JSON object a line, from a level on."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    root = logging.getLogger()
    # Only what an earlier call set up, of any package, is replaced: the process may be another program's.
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
        told = vars(record)
        fields = "".join(f" {name}={_word(str(told[name]))}" for name in FIELDS if told.get(name))
        text = f"{self.formatTime(record)} {record.levelname} {record.name}: {shown(record.getMessage())}{fields}"
        if record.exc_info:
            lines = self.formatException(record.exc_info).splitlines()
            text += "".join(f"\n    {shown(line)}" for line in lines)
        return text


class JsonLines(logging.Formatter):
    """Records for programs: `level`, `logger`, `message`, `exception`, the fields and `time`, all in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as one JSON object."""
        told = vars(record)
        found: dict[str, object] = {"level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        found |= {name: told[name] for name in FIELDS if told.get(name)}
        found["time"] = datetime.fromtimestamp(record.created, UTC).isoformat()
        return json.dumps(found, default=str)


def shown(text: str) -> str:
    """Return text with an escape for each character that a terminal, or a reader of lines, would obey."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _word(text: str) -> str:
    return repr(text) if not text or " " in text or "=" in text else shown(text)
