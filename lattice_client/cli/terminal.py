"""Owns printing text to a terminal. Rule: text of a server or a task is printed by these functions only.

Control characters can move the cursor, set titles and clipboards, and hide or reorder printed text. Only line ends and
tabs are printed; other control characters, and characters that reorder text, are removed or replaced.
"""

import re

import click
from rich.text import Text

# C0 without tabs and line ends, DEL, C1, direction marks and overrides, line and paragraph separators, and surrogates,
# which cannot be encoded.
HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Whole escape sequences (ECMA-48): with parameters, with a text, and of one character.
SEQUENCES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x9b[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c|$)|\x1b[ -/]*[0-~]"
)
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def harmless(text: str) -> str:
    """Return text with each control character replaced by U+FFFD."""
    return HARMFUL.sub("\N{REPLACEMENT CHARACTER}", text)


def one_line(text: str) -> str:
    """Return text as one harmless line."""
    return harmless(" ".join(text.split()))


def say(text: str, *, err: bool = False) -> None:
    """Print harmless text and a line end."""
    click.echo(harmless(text), err=err)


def printable(line: str) -> Text:
    """Return a line of another process's output, with its colours and without other control sequences."""
    kept: list[str] = []
    position = 0
    for found in SEQUENCES.finditer(line):
        kept.append(HARMFUL.sub("", line[position : found.start()]))
        if COLOURS.fullmatch(found.group()):
            kept.append(found.group())
        position = found.end()
    kept.append(HARMFUL.sub("", line[position:]))
    return Text.from_ansi("".join(kept), end="")
