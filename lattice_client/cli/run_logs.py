"""Owns `lattice runs logs`: the lines that the attempts of a run wrote, with their task, attempt and stream.

Rule: no value of a run is fetched or decoded. Lines of one stream of an attempt keep their order.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.text import Text

from lattice_client.cli.options import console, print_json
from lattice_client.cli.progress import ENDS, PREFIX_STYLES, label_of, overwritten
from lattice_client.cli.terminal import one_line, printable, say
from lattice_client.convert.events import RunEvent

Key = tuple[str, int, str]


@dataclass(frozen=True, slots=True)
class Line:
    """A line of output.

    Attributes:
        sequence: the number of the first event that has a part of it.
        is_notice: whether it is the notice that the rest of the output was cut.
    """

    sequence: int
    time_s: float
    task_id: str
    name: str
    attempt: int
    stream: str
    text: str
    is_notice: bool = False


@dataclass(frozen=True, slots=True)
class Wanted:
    """The lines a reader wants; an empty or zero field selects all."""

    task_ids: tuple[str, ...] = ()
    stream: str = ""
    attempt: int = 0

    def has(self, line: Line) -> bool:
        """Whether a line is wanted. The items of a mapped task belong to it."""
        is_of_task = not self.task_ids or any(
            line.task_id == task_id or line.task_id.startswith(f"{task_id}[") for task_id in self.task_ids
        )
        return is_of_task and self.stream in {"", line.stream} and self.attempt in {0, line.attempt}


class LineAssembly:
    """Joins the pieces of output that events carry to lines."""

    def __init__(self, after: int = 0) -> None:
        self._open: dict[Key, Line] = {}
        self._taken = after

    @property
    def resume_after(self) -> int:
        """The number of the event after which a reader continues without losing a line."""
        return min((line.sequence - 1 for line in self._open.values()), default=self._taken)

    def take(self, event: RunEvent) -> Iterator[Line]:
        """Yield the lines that an event completes; the end of an attempt completes its last lines.

        The event counts as taken with the last of them.
        """
        lines = list(self._take(event))
        yield from lines[:-1]
        self._taken = event.sequence
        yield from lines[-1:]

    def _take(self, event: RunEvent) -> Iterator[Line]:
        if event.type == "task_log":
            yield from self._add(event)
        elif event.type in ENDS:
            key = event.task_id, event.data["attempt"]
            yield from self._complete([found for found in self._open if found[:2] == key])
        elif event.type == "run_finished":
            yield from self._complete([*self._open])

    def rest(self) -> list[Line]:
        """Return the incomplete lines, for a reader that stops here."""
        return list(self._complete([*self._open]))

    def _add(self, event: RunEvent) -> Iterator[Line]:
        data = event.data
        key = event.task_id, data["attempt"], data["stream"]
        earlier = self._open.pop(key, None)
        new = Line(event.sequence, event.time_s, key[0], data["display_name"], *key[1:], "", data["truncated"])
        *whole, rest = ((earlier.text if earlier else "") + data["text"]).split("\n")
        for number, text in enumerate(whole):
            yield _shown(replace(new if number or earlier is None else earlier, text=text))
        if rest:
            # Of a progress bar without line ends only the newest state is kept.
            kept = overwritten(rest) + ("\r" if rest.endswith("\r") else "")
            self._open[key] = replace(new if whole or earlier is None else earlier, text=kept)

    def _complete(self, keys: list[Key]) -> Iterator[Line]:
        for key in keys:
            yield _shown(self._open.pop(key))


def _shown(line: Line) -> Line:
    return replace(line, text=overwritten(line.text))


class Printer:
    """Prints lines: with colours at a terminal, as cells separated by tabs in a pipe, or as JSON."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._styles: dict[str, str] = {}

    def print(self, line: Line, resume_after: int) -> None:
        """Print one line. A reader that stops after it may continue after the event `resume_after`."""
        if self._as_json:
            print_json(
                {
                    "sequence": line.sequence,
                    "resume_after": resume_after,
                    "time_s": line.time_s,
                    "task_id": line.task_id,
                    "display_name": line.name,
                    "attempt": line.attempt,
                    "stream": line.stream,
                    "text": line.text,
                    "is_truncation_notice": line.is_notice,
                }
            )
        elif console.is_terminal:
            console.print(self._prefixed(line), soft_wrap=True)
        else:
            text = printable(line.text).plain
            say(f"{one_line(line.task_id)}\t{line.attempt}\t{line.stream}\t{text}")

    def _prefixed(self, line: Line) -> Text:
        style = self._styles.setdefault(line.task_id, PREFIX_STYLES[len(self._styles) % len(PREFIX_STYLES)])
        again = f" #{line.attempt}" if line.attempt > 1 else ""
        mark = (" ! ", "red") if line.stream == "stderr" else (" | ", "dim")
        return Text.assemble((one_line(label_of(line.task_id, line.name)) + again, style), mark, printable(line.text))
