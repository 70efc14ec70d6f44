"""Each metric of the catalogue differs from zero under load, with the labels of the catalogue and no ids."""

import asyncio
import re
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from lattice_server.telemetry import catalogue
from lattice_server.telemetry.catalogue import INSTRUMENTS, Instrument, Kind
from lattice_server.telemetry.prometheus import prometheus_name, sample_name
from tests.server.telemetry.load import HELD, SETTINGS, WAIT_S, load
from tests.server.telemetry.workload import double, measured, on_a_loop, page_of, samples_of

ID = re.compile(r"[0-9a-f]{8}")


def sample_of(instrument: Instrument) -> str:
    """Return the sample that tells whether a metric has values."""
    return f"{prometheus_name(instrument)}_count" if instrument.kind is Kind.HISTOGRAM else sample_name(instrument)


@pytest.mark.slow
@on_a_loop
async def test_each_metric_differs_from_zero_after_a_scripted_load(tmp_path: Path) -> None:
    seen: set[str] = set()
    labels_by_sample: dict[str, set[tuple[str, ...]]] = {}
    values: set[str] = set()

    async with measured(journal=str(tmp_path / "journal"), **SETTINGS) as (app, client):

        async def see(*instruments: Instrument) -> None:
            wanted = {sample_of(instrument) for instrument in instruments}
            ends_at = time.monotonic() + WAIT_S
            while not wanted <= seen:
                assert time.monotonic() < ends_at, f"always zero: {wanted - seen}"
                for (name, labels), value in samples_of(await page_of(app)).items():
                    known = [label for label, _ in labels if label != "le"]
                    labels_by_sample.setdefault(name, set()).add(tuple(known))
                    values.update(value for label, value in labels if label != "le")
                    seen.update([name] if value else [])
                await asyncio.sleep(0.2)

        await load(client, tmp_path, lambda: see(*HELD))
        with closing(sqlite3.connect(tmp_path / "journal" / "journal.sqlite", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")  # The journal cannot commit meanwhile.
            last = asyncio.create_task(client.run_task(double, {"x": 1}))
            await see(catalogue.JOURNAL_PENDING)
            other.execute("ROLLBACK")
            await last
        await see(*INSTRUMENTS)
    for instrument in INSTRUMENTS:
        expected = tuple(sorted(label.replace(".", "_") for label in instrument.labels))
        assert labels_by_sample[sample_of(instrument)] == {expected}, instrument.name
    assert [value for value in values if ID.search(value)] == []
