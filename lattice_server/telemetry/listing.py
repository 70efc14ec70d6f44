"""Writes the list of all metrics as text: `python -m lattice_server.telemetry.listing` for docs/telemetry.md."""

from collections.abc import Iterator

from lattice_server.telemetry.catalogue import INSTRUMENTS, Instrument
from lattice_server.telemetry.prometheus import sample_name


def lines() -> Iterator[str]:
    """Yield one line for each metric: name, type, unit, labels, description, and the buckets of a histogram."""
    for instrument in INSTRUMENTS:
        labels = ",".join(instrument.labels) or "-"
        yield f"{instrument.name} {instrument.kind.value} {instrument.unit} {labels}"
        yield f"    {instrument.description}"
        if instrument.bounds:
            yield f"    {' '.join(f'{bound:g}' for bound in instrument.bounds)}"


def table() -> Iterator[str]:
    """Yield the lines of the table of docs/telemetry.md."""
    yield "| metric | in Prometheus | type, unit | labels | meaning |"
    yield "|---|---|---|---|---|"
    yield from map(_row, INSTRUMENTS)


def _row(instrument: Instrument) -> str:
    labels = ", ".join(f"`{label}`" for label in instrument.labels) or "—"
    name, sample = f"`{instrument.name}`", f"`{sample_name(instrument)}`"
    return f"| {name} | {sample} | {instrument.kind.value}, `{instrument.unit}` | {labels} | {instrument.description} |"


if __name__ == "__main__":
    print("\n".join(table()))
