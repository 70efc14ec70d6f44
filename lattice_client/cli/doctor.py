"""Owns `lattice doctor`: the faults of this machine, a server and its cluster, and advice about them."""

import asyncio
from collections.abc import Iterator

import click

from lattice_client.cli.cluster_checks import cluster_checks
from lattice_client.cli.findings import ERROR, Finding, print_findings
from lattice_client.cli.machine_checks import client_checks, machine_checks
from lattice_client.cli.options import Server, address, as_json
from lattice_client.cli.server_checks import Answer, answer_checks, ask, connection_checks
from lattice_client.client import AsyncLatticeClient


@click.command()
@address
@as_json
@click.option("--only", type=click.Choice(["machine", "server"]), help="Check only this machine, or only the server.")
def doctor(server: Server, as_json: bool, only: str | None) -> None:
    """Find out what is wrong with this machine, the server and its nodes, and what to do about it.

    Each finding is ok, a warning, an error, or a check that was skipped. The exit status is 1 when there is an error.
    Nothing is changed. On a machine without a server use `--only machine`.
    """
    if not print_findings(_findings(server, only), as_json):
        raise SystemExit(1)


def _findings(server: Server, only: str | None) -> Iterator[Finding]:
    yield from client_checks()
    if only != "server":
        yield from machine_checks()
    if only != "machine":
        yield from asyncio.run(_server_findings(server))


async def _server_findings(server: Server) -> list[Finding]:
    findings = [finding async for finding in connection_checks(server)]
    if any(finding.status == ERROR for finding in findings):
        return findings
    async with AsyncLatticeClient(server.target, **server.security()) as client:
        answer = await ask(client)
        if not isinstance(answer, Answer):
            return [*findings, answer]
        findings += answer_checks(answer)
        return [*findings, *[finding async for finding in cluster_checks(client, answer)]]
