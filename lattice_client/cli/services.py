"""Owns the commands `lattice services ...`. Rule: a service that cannot start is one message and exit status 1."""

import os
from collections.abc import Callable
from typing import Any

import click
from lattice.v1 import service_pb2

from lattice_client.cli.options import FiniteRange, Server, address, as_dict, as_json, connected, print_json, show
from lattice_client.cli.terminal import one_line, say
from lattice_client.graph.environment import Secret

COLUMNS = ("service", "state", "ready", "in flight", "restarts", "endpoint", "detail")
REACH = click.Choice(["node", "cluster"])
INSTANCE_COLUMNS = ("instance", "state", "node", "endpoint", "in flight", "run", "detail")


@click.group()
def services() -> None:
    """Start, list, scale and stop services, and show what they write."""


def resource_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of an instance's resources and of how many there are."""
    amount = FiniteRange(0)
    for option in (
        click.option("--cpu", type=amount, help="CPUs of one instance.  [default: 1]"),
        click.option("--gpu", type=amount, help="GPUs of one instance; a fraction shares one."),
        click.option("--cpu-mem", type=amount, help="Memory of one instance, in MiB."),
        click.option("--gpu-mem", type=amount, help="Memory on each GPU, in MiB."),
        click.option("--replicas", type=click.IntRange(0), default=1, show_default=True, help="The fewest instances."),
        click.option("--max-replicas", type=click.IntRange(1), help="The most instances.  [default: --replicas]"),
        click.option(
            "--concurrency", type=click.IntRange(1), help="Open requests of an instance, above which more are started."
        ),
        click.option("--idle-timeout", type=amount, help="Seconds without use after which all instances are stopped."),
        click.option("--start-timeout", type=amount, help="Seconds that an instance may take to be ready."),
        click.option("--env", "variables", multiple=True, metavar="NAME=VALUE", help="An environment variable."),
        click.option(
            "--secret-env", "secrets", multiple=True, metavar="NAME", help="A variable from here, as a secret."
        ),
        click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label that the node must have."),
        click.option(
            "--reach",
            type=REACH,
            default="node",
            show_default=True,
            help="The tasks that reach it: those of its node, or all.",
        ),
        click.option("--wait/--no-wait", default=True, help="Wait until an instance is ready."),
        click.option("--timeout", type=amount, help="Seconds to wait at most."),
    ):
        command = option(command)
    return command


def settings_of(given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a service by the options of `resource_options`. Raises BadParameter."""
    variables, labels = given.pop("variables"), given.pop("labels")
    for text in (*variables, *labels):
        if "=" not in text:
            raise click.BadParameter(f"{text!r} is not NAME=VALUE")
    environment: dict[str, str | Secret] = dict(_pair(text) for text in variables)
    for name in given.pop("secrets"):
        if name not in os.environ:
            raise click.BadParameter(f"the environment has no variable {name!r}", param_hint="--secret-env")
        environment[name] = Secret(name)
    return given | {"env": environment, "node_selector": dict(_pair(text) for text in labels)}


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


@services.command(context_settings={"allow_interspersed_args": False})
@address
@resource_options
@click.option("--health", default="", metavar="PATH", help="A path that has to answer by HTTP.")
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def start(server: Server, name: str, command: tuple[str, ...], **given: Any) -> None:
    """Start a service from a command, in which {host} and {port} are replaced by its address.

    Options stand before NAME. All words after NAME are the command, without quotes around it:

        lattice services start files python -m http.server {port} --bind {host}
    """
    wait, timeout = given.pop("wait"), given.pop("timeout")
    settings = settings_of(given)
    if command[0] == "--":  # As other commands take a program and its arguments.
        command = command[1:]
    with connected(server) as client:
        try:
            found = client.services.start(name, command, wait=wait, timeout=timeout, **settings)
        except TimeoutError as error:
            raise click.ClickException(str(error)) from None
    say_started(found)


def say_started(service: service_pb2.Service) -> None:
    """Say where a service that was started is."""
    ready = [one for one in service.instances if one.state == service_pb2.INSTANCE_STATE_READY]
    where = ", ".join(f"{one.endpoint} on {one.node_id}" for one in ready)
    say(f"Service {service.spec.name} is {_state(service)}{f': {where}' * bool(where)}.")


@services.command("list")
@address
@as_json
def list_services(server: Server, as_json: bool) -> None:
    """List services."""
    with connected(server) as client:
        show_services(client.services.list(), as_json)


def show_services(found: list[service_pb2.Service], as_json: bool) -> None:
    """Show a list of services."""
    if as_json:
        for service in found:
            print_json(as_dict(service))
        return
    show(COLUMNS, map(row_of, found), wrapped="detail")


def row_of(service: service_pb2.Service) -> tuple[str, ...]:
    """Return the cells of a service in a list."""
    ready = [one for one in service.instances if one.state == service_pb2.INSTANCE_STATE_READY]
    in_flight = sum(one.in_flight for one in ready)
    endpoint = ready[0].endpoint if ready else ""
    detail = service.failure.message if service.HasField("failure") else ""
    counts = f"{len(ready)}/{service.wanted}"
    return (service.spec.name, _state(service), counts, str(in_flight), str(service.restarts), endpoint, detail)


def _state(service: service_pb2.Service) -> str:
    return service_pb2.ServiceState.Name(service.state).removeprefix("SERVICE_STATE_").lower()


@services.command("show")
@address
@as_json
@click.argument("name")
def show_service(server: Server, as_json: bool, name: str) -> None:
    """Show one service and its instances."""
    with connected(server) as client:
        found = client.services.get(name)
    show_services([found], as_json)
    if as_json:
        return
    say("")
    show(INSTANCE_COLUMNS, map(_instance_row, found.instances), wrapped="run")
    for line in found.failure.last_lines:
        say(f"  {one_line(line)}")


def _instance_row(one: service_pb2.ServiceInstance) -> tuple[str, ...]:
    state = service_pb2.InstanceState.Name(one.state).removeprefix("INSTANCE_STATE_").lower()
    return (one.instance_id, state, one.node_id, one.endpoint, str(one.in_flight), one.run_id, one.detail)


@services.command()
@address
@click.argument("name")
@click.argument("replicas", type=click.IntRange(0))
@click.option("--max-replicas", type=click.IntRange(1), help="The most instances.")
def scale(server: Server, name: str, replicas: int, max_replicas: int | None) -> None:
    """Change how many instances a service has at least."""
    with connected(server) as client:
        found = client.services.scale(name, replicas, max_replicas)
    say(f"Service {name} wants {found.wanted} instances.")


@services.command()
@address
@click.argument("name")
@click.option("--timeout", type=FiniteRange(0), help="Seconds to wait at most.")
def stop(server: Server, name: str, timeout: float | None) -> None:
    """Stop a service and wait until none of its processes is left."""
    with connected(server) as client:
        client.services.get(name)  # A name that is misspelled is an error here; the call itself may be repeated.
        try:
            client.services.stop(name, timeout=timeout)
        except TimeoutError as error:
            raise click.ClickException(str(error)) from None
    say(f"Service {name} is stopped.")


@services.command()
@address
@as_json
@click.argument("name")
@click.option("--instance", default="", help="Only the lines of this instance.")
@click.option("--follow", "-f", is_flag=True, help="Wait for more lines, to the end of the service.")
def logs(server: Server, as_json: bool, name: str, instance: str, follow: bool) -> None:
    """Show what the instances of a service wrote."""
    with connected(server) as client:
        for line in client.services.logs(name, instance=instance, follow=follow):
            if as_json:
                print_json(as_dict(line))
            else:
                say(f"{line.instance_id}: {one_line(line.text)}")
