"""Owns the command `lattice`. Rule: commands of other packages are found by entry points, never imported by name."""

import os
import subprocess
import sys

import click
from lattice.v1 import cluster_pb2, resources_pb2

from lattice_client import logs
from lattice_client.cli.doctor import doctor
from lattice_client.cli.inspection import read_logs, show_run, show_timeline
from lattice_client.cli.llms import llm
from lattice_client.cli.options import (
    DISTRIBUTION,
    Commands,
    Server,
    address,
    as_dict,
    as_json,
    connected,
    print_json,
    show,
)
from lattice_client.cli.runs import runs
from lattice_client.cli.services import services
from lattice_client.cli.streaming import stream
from lattice_client.cli.terminal import one_line, say


@click.group(cls=Commands)
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


runs.add_command(stream)
main.add_command(runs)
main.add_command(services)
main.add_command(llm)
main.add_command(doctor)
for command in (show_run, show_timeline, read_logs):
    runs.add_command(command)


@main.command()
@address
@as_json
def status(server: Server, as_json: bool) -> None:
    """Show the server's version and load."""
    with connected(server) as client:
        info = client.server_info()
    if as_json:
        print_json(as_dict(info))
        return
    rows = [
        ("version", info.version),
        ("executor", info.executor),
        ("process", str(info.pid)),
        ("active runs", str(info.active_runs)),
        ("queued tasks", str(info.queued_tasks)),
        ("running attempts", str(info.running_attempts)),
    ]
    show(("server", server.target), rows, wrapped=server.target)


@main.group(invoke_without_command=True)
@address
@as_json
@click.pass_context
def nodes(context: click.Context, server: Server, as_json: bool) -> None:
    """List the nodes and their free resources, or drain a node."""
    if context.invoked_subcommand is not None:
        return
    with connected(server) as client:
        found = client.nodes()
    if as_json:
        for node in found:
            print_json(as_dict(node))
        return
    rows = [
        (
            node.node_id,
            _state(node),
            node.node_ip,
            f"{node.free.cpu:g}/{node.capacity.cpu:g}",
            f"{node.free.memory_bytes / 2**30:.1f}/{node.capacity.memory_bytes / 2**30:.1f}",
            str(len(node.capacity.gpus)),
            str(node.attempts),
        )
        for node in found
    ]
    show(("node", "state", "address", "cpu free", "GiB free", "gpus", "attempts"), rows, wrapped="node")
    for node in found:
        if node.memory_enforcement in LIMITED:
            say(f"{node.node_id}: the memory of sandboxes is {LIMITED[node.memory_enforcement]}")
        for refusal in node.isolation_refusals:
            say(f"{node.node_id} does not offer isolation {_level(refusal)}: {one_line(refusal.reason)}")


LIMITED = {
    resources_pb2.MEMORY_ENFORCEMENT_CGROUP: "limited by the kernel (cgroup)",
    resources_pb2.MEMORY_ENFORCEMENT_MEASURED: "measured by the worker every 50 ms",
}


def _level(refusal: resources_pb2.IsolationRefusal) -> str:
    return resources_pb2.Isolation.Name(refusal.isolation).removeprefix("ISOLATION_").lower()


@nodes.command()
@address
@click.argument("node_id")
@click.option("--deadline", type=click.FloatRange(0), help="Seconds after which running attempts are moved.")
def drain(server: Server, node_id: str, deadline: float | None) -> None:
    """Let a node finish its running attempts and leave.

    The server replaces a worker that it started itself, so that such a node returns after it was drained.
    """
    with connected(server) as client:
        node = client.drain_node(node_id, deadline)
    say(f"{node.node_id} is {_state(node)}; running attempts: {node.attempts}")
    say("The server replaces workers it started itself: such a node returns after it was drained.", err=True)


def _state(node: cluster_pb2.Node) -> str:
    return cluster_pb2.NodeState.Name(node.state).removeprefix("NODE_STATE_").lower()


# Arguments after the script belong to the script, even if they look like an option of this command.
@main.command(context_settings={"allow_interspersed_args": False})
@address
@click.argument("script", type=click.Path(exists=True, dir_okay=False))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(server: Server, script: str, arguments: tuple[str, ...]) -> None:
    """Run a Python script as `python SCRIPT` does, with the server's address in its environment."""
    sys.stdout.flush()
    command, environment = [sys.executable, script, *arguments], {**os.environ, **server.environment()}
    if os.name == "nt":  # Its `execve` starts another process, and does not wait for it.
        raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)
    # A new interpreter in this process: exit status, signals, tracebacks and `__main__` are those of the script.
    os.execve(sys.executable, command, environment)
