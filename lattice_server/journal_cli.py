"""The command `lattice journal`. Rule: it changes no journal, and prints no text of one but as JSON."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO

import click

from lattice_server.engine.recording.journal_port import JournalError, JournalLockedError
from lattice_server.journal.backup import back_up
from lattice_server.journal.checking import Damage, JournalCheck, runs_of
from lattice_server.journal.stopped import StoppedJournal, stopped_sqlite
from lattice_server.rpc.convert.exported_records import Exporter

POSTGRES = ("postgresql://", "postgres://")
place = click.argument("place", metavar="FOLDER|URL", envvar="LATTICE_JOURNAL")


@click.group()
def journal() -> None:
    """Check, copy or export the records of a server; see docs/durability.md."""


@journal.command()
@place
@click.option("--json", "as_json", is_flag=True, help="One JSON document a line.")
def check(place: str, as_json: bool) -> None:
    """Read all records of a stopped server's journal, and name the runs that are damaged.

    The exit status is 1 when there is damage.
    """
    with _errors(place), _stopped(place) as opened:
        _report(JournalCheck(opened), as_json)


@journal.command()
@click.argument("folder", envvar="LATTICE_JOURNAL", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
def backup(folder: Path, target: Path) -> None:
    """Copy a journal to a new folder, also while a server uses it, and check the copy.

    A server that is started with the copy as its `--journal` continues the runs from there.
    """
    if str(folder).startswith(("postgresql:", "postgres:")):
        raise click.ClickException("a database is copied by pg_dump, also while a server uses it")
    with _errors(str(folder)):
        back_up(folder, target)
        click.echo(f"Copied the journal to {target}.")
        with stopped_sqlite(target) as opened:
            _report(JournalCheck(opened), as_json=False)


@journal.command()
@place
@click.option("--run", "run_ids", multiple=True, metavar="RUN", help="Export runs of this id only; may be repeated.")
@click.option(
    "--output", type=click.File("w", encoding="utf-8", lazy=True), default="-", help="A file; default stdout."
)
def export(place: str, run_ids: tuple[str, ...], output: IO[str]) -> None:
    """Write the records of a stopped server's journal as JSON, one document a line.

    Ended runs come first, the newest at the beginning. The exit status is 1 when a run or workflow is damaged, or when
    there is no run of a given id.
    """
    missing = dict.fromkeys(run_ids)
    with _errors(place), _stopped(place) as opened:
        exporter = Exporter(opened.reader)
        for run in runs_of(opened.reader):
            if not run_ids or run.run_id in run_ids:
                missing.pop(run.run_id, None)
                _write(output, exporter.run(run))
        for workflow in () if run_ids else opened.reader.workflows():
            _write(output, exporter.workflow(workflow))
    if exporter.damaged:
        raise click.ClickException(f"{exporter.damaged} runs or workflows are damaged; see their lines of kind damage")
    if missing:
        raise click.ClickException(f"the journal has no run {', '.join(map(json.dumps, missing))}")


def _write(output: IO[str], documents: Iterable[object]) -> None:
    output.writelines(json.dumps(document) + "\n" for document in documents)


def _report(checking: JournalCheck, as_json: bool) -> None:
    """Print the result of a check. Exits with 1 for damage."""
    damages = 0
    for damage in checking.damages():
        damages += 1
        if as_json:
            found = {"kind": damage.kind, "tenant": damage.tenant, "name": damage.name, "reason": damage.reason}
            click.echo(json.dumps(found))
        else:
            click.echo(_line(damage))
    counts = f"{checking.runs} runs, of which {checking.live_runs} have not ended; {checking.events} events"
    result = f"{damages} findings" if damages else "no damage"
    click.echo(f"{counts}; {checking.workflows} workflows: {result}", err=as_json)
    if damages:
        sys.exit(1)


def _line(damage: Damage) -> str:
    """Return a finding as a line; ids are quoted as in JSON, since they may hold any character."""
    if damage.kind == "database":
        return f"database: {damage.reason}"
    tenant = f" of tenant {json.dumps(damage.tenant)}" if damage.tenant else ""
    return f"{damage.kind} {json.dumps(damage.name)}{tenant}: {damage.reason}"


def _stopped(place: str) -> AbstractContextManager[StoppedJournal]:
    if not place.startswith(POSTGRES):
        return stopped_sqlite(Path(place))
    from lattice_server.journal.postgres import PostgresSettings, stopped_postgres

    return stopped_postgres(PostgresSettings(place))


@contextmanager
def _errors(place: str) -> Iterator[None]:
    """Show the errors of the journal at a place as those of a command. Raises click.ClickException."""
    try:
        yield
    except JournalLockedError as error:
        copied = (
            "pg_dump and restore a copy" if place.startswith(POSTGRES) else "`lattice journal backup` and use the copy"
        )
        raise click.ClickException(f"{error}; stop it, or {copied}") from None
    except (JournalError, OSError) as error:
        raise click.ClickException(str(error)) from None
