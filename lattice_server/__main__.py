"""`python -m lattice_server`: what `lattice start` turns into."""

import click

from lattice_server.cli import start, stop

click.Group("lattice", commands=[start, stop])(prog_name="lattice")
