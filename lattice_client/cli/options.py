"""Owns the parts that commands share: their options, the connection to a server, and the output of results.

Rule: tables for people, one JSON document a line for programs (`--json`), one line on stderr for an error.
"""

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lattice_client.cli.terminal import one_line, say
from lattice_client.errors import UnavailableError
from lattice_client.sync import LatticeClient
from lattice_client.transport.channel import DEFAULT_TARGET
from lattice_client.transport.security import SecurityOptions

# Values nested deeper than this are shown by their `repr`.
MAX_DEPTH = 50
# Python converts no longer integers to text by default.
MAX_BITS = 14_000

console = Console()
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document a line.")


class FiniteRange(click.FloatRange):
    """A number in a range, and not NaN, which a range of click lets through, nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number. Raises click.BadParameter."""
        found: float = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return found


@dataclass(frozen=True, slots=True)
class Server:
    """The server of a command, and how to connect to it. The token comes from the environment only."""

    target: str
    tls_ca: str | None
    insecure: bool

    def security(self) -> SecurityOptions:
        """Return the security options of a client."""
        return SecurityOptions(tls_ca=self.tls_ca, insecure=self.insecure)

    def environment(self) -> dict[str, str]:
        """Return the environment variables by which another program connects to the same server."""
        found = {"LATTICE_TARGET": self.target}
        if self.tls_ca is not None:
            found["LATTICE_TLS_CA"] = self.tls_ca
        if self.insecure:
            found["LATTICE_INSECURE"] = "1"
        return found


def address(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that name a server to a command, which gets them as its argument `server`."""

    @click.option(
        "--addr", envvar="LATTICE_TARGET", default=DEFAULT_TARGET, show_default=True, help="The server, host:port."
    )
    @click.option(
        "--tls-ca",
        envvar="LATTICE_TLS_CA",
        type=click.Path(exists=True, dir_okay=False),
        help="Use TLS and trust this authority's certificate.",
    )
    @click.option(
        "--insecure",
        envvar="LATTICE_INSECURE",
        is_flag=True,
        help="Connect beyond this machine without TLS or a token.",
    )
    @functools.wraps(command)
    def wrapped(addr: str, tls_ca: str | None, insecure: bool, **others: Any) -> None:
        if not addr:
            raise click.BadParameter("it is empty; name a server, host:port, or leave it out", param_hint="'--addr'")
        command(server=Server(addr, tls_ca, insecure), **others)

    return wrapped


@contextmanager
def reachable(addr: str) -> Iterator[None]:
    """Raise ClickException with advice when a call in the block cannot reach the server."""
    try:
        yield
    except UnavailableError as error:
        if error.reason:  # a server answered with the reason why it cannot serve the call
            raise
        hint = error.advice or "start one with `lattice start --head`, or name another with --addr or LATTICE_TARGET"
        raise click.ClickException(f"no Lattice server answers at {addr}: {hint}") from None


@contextmanager
def connected(server: Server) -> Iterator[LatticeClient]:
    """Connect a client to the server for the duration of a block."""
    with reachable(server.target), LatticeClient(server.target, **server.security()) as client:
        yield client


def show(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]], *, wrapped: str = "") -> None:
    """Show a table; to a pipe, lines of cells separated by tabs. Only the cells of the column `wrapped` are wrapped."""
    cells = [tuple(map(one_line, row)) for row in rows]
    if not console.is_terminal:
        for row in (columns, *cells):
            say("\t".join(row))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=column != wrapped, overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    console.print(table)


def as_dict(message: Message) -> dict[str, Any]:
    """Return a message as a dict with all its fields, including zeros."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def print_json(document: Any) -> None:
    """Print a document as one line; a value that is not JSON is replaced by its `repr`."""
    say(json.dumps(_jsonable(document)))


def _jsonable(value: Any, above: tuple[int, ...] = ()) -> Any:
    """Return a value with each part that is not JSON replaced by its `repr`; `above` are its containers' identities."""
    inside = (*above, id(value))
    match value:
        case None | bool() | str():
            return value
        case int():
            return value if value.bit_length() <= MAX_BITS else written(value)
        case float():
            return value if math.isfinite(value) else repr(value)
        case dict() | list() | tuple() if id(value) in above or len(above) > MAX_DEPTH:
            return written(value)
        case dict():
            return {_key(key): _jsonable(item, inside) for key, item in value.items()}
        case list() | tuple():
            return [_jsonable(item, inside) for item in value]
        case _:
            return written(value)


def _key(key: Any) -> str:
    return key if isinstance(key, str) else written(key)


def written(value: Any) -> str:
    """Return the `repr` of a value, or its class when that fails."""
    try:
        return repr(value)
    except Exception:  # `__repr__` is code of the user, and Python refuses integers of many digits
        return f"<{type(value).__name__}>"
