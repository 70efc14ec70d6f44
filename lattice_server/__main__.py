"""`python -m lattice_server`: what `lattice start` turns into."""

import os

import click

from lattice_server.cli import start, stop

# Read when grpc is imported, which serving does. Fork handlers: see the package.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
# By default gRPC writes a line for each failed TLS handshake, so any program that finds the port could fill the disk.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

click.Group("lattice", commands=[start, stop])(prog_name="lattice")
