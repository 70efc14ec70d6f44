"""Owns what a terminal is given. Rule: text of a server or a task is printed by these functions only.

A terminal obeys control characters: they move the cursor, set titles and clipboards, and hide or reorder what was
printed before. So none but line ends and tabs gets through, and no character that reorders others.
"""

import re

import click
from rich.text import Text

# C0 but tabs and line ends, DEL, C1, marks and overrides of direction, separators of lines and paragraphs, and halves
# of characters, which no terminal can be sent.
HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Escape sequences as a whole (ECMA-48): with parameters, with a text, and of one character.
SEQUENCES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x9b[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c|$)|\x1b[ -/]*[0-~]"
)
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def harmless(text: str) -> str:
    """Return text with a replacement character for each character a terminal would obey."""
    return HARMFUL.sub("\N{REPLACEMENT CHARACTER}", text)


def one_line(text: str) -> str:
    """Return text as one harmless line."""
    return harmless(" ".join(text.split()))


def say(text: str, *, err: bool = False) -> None:
    """Print text, and a line end."""
    click.echo(harmless(text), err=err)


def printable(line: str) -> Text:
    """Return a line another process wrote, with its colours, and without whatever else a terminal would obey."""
    kept: list[str] = []
    position = 0
    for found in SEQUENCES.finditer(line):
        kept.append(HARMFUL.sub("", line[position : found.start()]))
        if COLOURS.fullmatch(found.group()):
            kept.append(found.group())
        position = found.end()
    kept.append(HARMFUL.sub("", line[position:]))
    return Text.from_ansi("".join(kept), end="")
