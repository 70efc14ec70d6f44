"""Owns the commands `lattice llm ...`. Rule: a model is a service, so that only its start is a command of its own."""

import shlex
from typing import Any

import click

from lattice_client.cli.options import Server, address, as_json, connected
from lattice_client.cli.services import (
    logs,
    resource_options,
    say_started,
    scale,
    settings_of,
    show_service,
    show_services,
    stop,
)
from lattice_client.graph.environment import Secret
from lattice_client.services.llms import ENGINES


@click.group()
def llm() -> None:
    """Start, list, scale and stop language models, and show what their engines write."""


@llm.command()
@address
@resource_options
@click.option("--engine", type=click.Choice([*ENGINES]), help="The engine.  [default: vllm; openai with --command]")
@click.option("--command", default="", help="A command that serves the API of OpenAI at {host} and {port}.")
@click.option("--argument", "arguments", multiple=True, help="A further argument of the engine.")
@click.option("--base-url", default="", help="The URL of a provider outside of the cluster.")
@click.option("--api-key-env", default="", metavar="NAME", help="The variable with the key of the provider.")
@click.option("--health", default="", metavar="PATH", help="A path that has to answer by HTTP.")
@click.argument("name")
@click.argument("model", default="")
def start(server: Server, name: str, model: str, engine: str | None, command: str, **given: Any) -> None:
    """Start MODEL, a name of a hub or a folder on the nodes, as NAME."""
    if given.pop("reach") != "node":
        raise click.BadParameter("models are reached by the gateways of the nodes", param_hint="--reach")
    wait, timeout = given.pop("wait"), given.pop("timeout")
    base_url, variable = given.pop("base_url"), given.pop("api_key_env")
    settings = settings_of(given)
    if base_url:
        settings["base_url"] = base_url
    if variable:
        settings["api_key"] = Secret(variable)
    with connected(server) as client:
        try:
            found = client.llm.start(
                name, model, engine=engine or "", command=shlex.split(command), wait=wait, timeout=timeout, **settings
            )
        except TimeoutError as error:
            raise click.ClickException(str(error)) from None
    say_started(found)


@llm.command("list")
@address
@as_json
def list_llms(server: Server, as_json: bool) -> None:
    """List language models."""
    with connected(server) as client:
        show_services(client.llm.list(), as_json)


for shared in (show_service, scale, stop, logs):
    llm.add_command(shared)
