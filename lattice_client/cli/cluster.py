"""Owns the commands `lattice status` and `lattice nodes`."""

import click
from lattice.v1 import cluster_pb2, resources_pb2

from lattice_client.cli.options import FiniteRange, Server, address, as_dict, as_json, connected, print_json, show
from lattice_client.cli.terminal import one_line, say

MAX_DEADLINE_S = 30 * 86_400


@click.command()
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


@click.group(invoke_without_command=True)
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
@click.option("--deadline", type=FiniteRange(0, MAX_DEADLINE_S), help="Seconds after which running attempts are moved.")
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
