"""Owns the command `lattice`. Rule: commands of other packages are found by entry points, never imported by name."""

import os

import click

from lattice_client import logs
from lattice_client.cli.groups import DISTRIBUTION, Commands

COMMANDS = {
    "doctor": (
        "lattice_client.cli.doctor:doctor",
        "Find out what is wrong with this machine, the server and its nodes, and what to do about it.",
    ),
    "llm": (
        "lattice_client.cli.llms:llm",
        "Start, list, scale and stop language models, and show what their engines write.",
    ),
    "nodes": (
        "lattice_client.cli.cluster:nodes",
        "List the nodes and their free resources, or drain a node.",
    ),
    "run": (
        "lattice_client.cli.script:run",
        "Run a Python script as `python SCRIPT` does, with the server's address in its environment.",
    ),
    "runs": (
        "lattice_client.cli.runs:runs",
        "List, show, watch, signal, cancel, delete and retry runs; read their output and times.",
    ),
    "services": (
        "lattice_client.cli.services:services",
        "Start, list, scale and stop services, and show what they write.",
    ),
    "status": (
        "lattice_client.cli.cluster:status",
        "Show the server's version and load.",
    ),
}


@click.group(cls=Commands, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name=DISTRIBUTION, prog_name="lattice", message="%(prog)s %(version)s")
@click.option(
    "--log-level", type=click.Choice(logs.LEVELS), envvar="LATTICE_LOG_LEVEL", help="The lowest level to log."
)
@click.option(
    "--log-format",
    type=click.Choice(logs.FORMATS),
    envvar="LATTICE_LOG_FORMAT",
    help="Write log records as text, or as one JSON object each.",
)
def main(log_level: str | None, log_format: str | None) -> None:
    """Lattice, a control plane for the workflows of LLM agents."""
    logs.set_up(log_format or "text", log_level or "warning")
    # `start` and `run` start another program, which reads these settings from the environment.
    given = {"LATTICE_LOG_LEVEL": log_level, "LATTICE_LOG_FORMAT": log_format}
    os.environ.update({name: value for name, value in given.items() if value})
