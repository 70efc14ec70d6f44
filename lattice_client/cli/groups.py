"""Owns the groups of commands, and the text that a failed command prints. Rule: commands are imported when used."""

import errno
import logging
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from io import TextIOWrapper
from pkgutil import resolve_name
from typing import Any

import click

from lattice_client.cli.terminal import harmless
from lattice_client.errors import LatticeError

log = logging.getLogger(__name__)

DISTRIBUTION = "lattice-control-plane"
ENTRY_POINTS = "lattice.commands"


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used.

    `lazy` has the place of each command, `module:name`, and its text in the list of commands.
    """

    def __init__(self, *given: Any, lazy: Mapping[str, tuple[str, str]], **named: Any) -> None:
        super().__init__(*given, **named)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted({*super().list_commands(ctx), *self.lazy})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name."""
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        command: click.Command = resolve_name(self.lazy[cmd_name][0])
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the arguments begin with. Raises click.UsageError, with names that are similar."""
        name = args[0]
        if name[:1].isalnum() and self.get_command(ctx, name) is None:
            similar = " or ".join(map(repr, get_close_matches(name, self.list_commands(ctx))))
            raise click.UsageError(f"No such command {name!r}." + (f" Did you mean {similar}?" if similar else ""), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands, without importing those of `lazy`."""
        names = self.list_commands(ctx)
        width = formatter.width - 6 - max(map(len, names))
        with formatter.section("Commands"):
            formatter.write_dl([(name, self._summary(ctx, name).get_short_help_str(width)) for name in names])

    def _summary(self, ctx: click.Context, name: str) -> click.Command:
        found = click.Command(name, help=self.lazy[name][1]) if name in self.lazy else self.get_command(ctx, name)
        assert found is not None
        return found


class Commands(LazyGroup):
    """The commands of this package, and those of the entry points."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; print an error of this package as one message."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                # A character that the terminal's encoding lacks must not end a command.
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except LatticeError as error:
            raise click.ClickException(harmless(str(error))) from None
        except click.UsageError:  # its text is the user's own input
            raise
        except click.ClickException as error:
            raise click.ClickException(harmless(error.message)) from None
        except (click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            # A reader that closed its pipe is no error: click ends such a command in silence.
            if log.isEnabledFor(logging.DEBUG) or (isinstance(error, OSError) and error.errno == errno.EPIPE):
                raise
            raise click.ClickException(_unexpected(error)) from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted({*super().list_commands(ctx), *entry_points(group=ENTRY_POINTS).names})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name."""
        found = super().get_command(ctx, cmd_name)
        for entry in entry_points(group=ENTRY_POINTS, name=cmd_name) if found is None else ():
            try:
                loaded: click.Command = entry.load()
            except Exception as error:
                return _broken(entry, error)
            return loaded
        return found


def _unexpected(error: Exception) -> str:
    """Return the message of an error that no command expects."""
    if isinstance(error, OSError):
        return harmless(str(error))
    what = harmless(f"{type(error).__name__}: {error}")
    return f"a bug of Lattice, {what}; `lattice --log-level debug` with the same command shows where"


def _broken(entry: EntryPoint, error: Exception) -> click.Command:
    """Return a command in place of one that cannot be imported; the other commands work without it."""
    reason, summary = f"cannot be loaded: {type(error).__name__}: {error}", "Cannot be loaded."
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("lattice"):
        extra = entry.module.partition(".")[0].removeprefix("lattice_")
        reason, summary = (
            f'needs more packages: pip install "{DISTRIBUTION}[{extra}]"',
            f"Needs {DISTRIBUTION}[{extra}].",
        )

    def fail() -> None:
        raise click.ClickException(f"`lattice {entry.name}` {reason}")

    anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    return click.Command(entry.name, callback=fail, help=summary, context_settings=anything, add_help_option=False)
