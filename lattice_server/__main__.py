"""`python -m lattice_server`: the commands of the server alone."""

import click

from lattice_server.cli import start, stop

click.Group("lattice", commands=[start, stop])(prog_name="lattice")
