"""The command `lattice token`. Rule: a token is printed once and stored nowhere."""

import fcntl
import json
import os
import re
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from lattice_server.security import SecurityError
from lattice_server.tokens import SCOPES, check_mode, check_name, digest_of, new_token, read_tokens

UNITS = {"d": "days", "h": "hours", "m": "minutes"}


@click.group()
def token() -> None:
    """Make tokens for `lattice start --tokens-file`."""


@token.command()
@click.option("--subject", required=True, help="The bearer of the token.")
@click.option(
    "--tenant", default="", help="The tenant whose runs, workflows and uploads it reaches; '*' for all tenants."
)
@click.option(
    "--scope",
    "scopes",
    type=click.Choice([*SCOPES]),
    multiple=True,
    required=True,
    help="The RPCs it may call.",
)
@click.option("--expires", metavar="WHEN", help="30d, 12h, 45m, or a time such as 2027-01-31T00:00:00Z.")
@click.option("--node", "nodes", multiple=True, help="A node id, or a pattern, that its workers may have.")
@click.option(
    "--tokens-file",
    type=click.Path(dir_okay=False, path_type=Path),
    envvar="LATTICE_TOKENS_FILE",
    help="Add the entry to this file; without it the entry goes to stderr.",
)
def new(
    subject: str, tenant: str, scopes: tuple[str, ...], expires: str | None, nodes: tuple[str, ...], tokens_file: Path
) -> None:
    """Make a token and print it, alone, to stdout. The server's file gets its digest only."""
    made = new_token()
    try:
        entry = _entry(subject, digest_of(made), tenant, scopes, expires, nodes)
        if tokens_file is not None:
            _add(Path(os.path.realpath(tokens_file)), entry)
    except SecurityError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{tokens_file}: {error.strerror or error}") from None
    if tokens_file is None:
        click.echo(entry, err=True, nl=False)
    click.echo(made)


def _entry(
    subject: str, digest: str, tenant: str, scopes: tuple[str, ...], expires: str | None, nodes: tuple[str, ...]
) -> str:
    lines = ["[[token]]", f"subject = {_text(check_name(subject, '--subject'))}", f'sha256 = "{digest}"']
    if tenant:
        lines.append(f"tenant = {_text(check_name(tenant, '--tenant'))}")
    lines.append(f"scopes = [{', '.join(map(_text, dict.fromkeys(scopes)))}]")
    if expires is not None:
        time = _time(expires)
        if time <= datetime.now(UTC):
            raise click.UsageError(f"--expires {expires!r} is not in the future: the token would never be accepted")
        lines.append(f"expires = {time:%Y-%m-%dT%H:%M:%SZ}")
    if nodes:
        lines.append(f"nodes = [{', '.join(_text(check_name(node, '--node')) for node in nodes)}]")
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    """Return a printable text as a TOML string; JSON has the same syntax."""
    return json.dumps(text, ensure_ascii=False)


def _time(text: str) -> datetime:
    """Return when a token expires. Raises click.UsageError."""
    if found := re.fullmatch(r"(\d{1,6})([dhm])", text):
        return datetime.now(UTC) + timedelta(**{UNITS[found[2]]: int(found[1])})
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise click.UsageError(f"--expires {text!r} is neither 30d, 12h, 45m nor a time with its offset from UTC")
    return time.astimezone(UTC)


def _add(path: Path, entry: str) -> None:
    """Append an entry to a tokens file in one step, so that a server never reads a part of it.

    Raises SecurityError, OSError.
    """
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Without the lock, two commands at once would each overwrite the entry of the other.
        fcntl.flock(folder, fcntl.LOCK_EX)
        known = ""
        if path.exists():
            with path.open(encoding="utf-8") as file:
                check_mode(os.fstat(file.fileno()))
                known = file.read()
        separator = "" if not known else "\n" if known.endswith("\n") else "\n\n"
        # `mkstemp` creates a file that only this user may read.
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        draft = Path(name)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(f"{known}{separator}{entry}")
                file.flush()
                os.fsync(file.fileno())
            read_tokens(draft)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    finally:
        os.close(folder)
