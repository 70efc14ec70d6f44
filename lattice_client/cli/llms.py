"""Owns the commands `lattice llm ...`. Rule: a model is a service, so that only its start is a command of its own."""

import shlex
from typing import Any

import click
from lattice.v1 import service_pb2

from lattice_client.cli.options import FiniteRange, Server, address, as_json, connected, show
from lattice_client.cli.services import (
    COLUMNS,
    logs,
    resource_options,
    row_of,
    say_started,
    scale,
    settings_of,
    show_service,
    show_services,
    stop,
)
from lattice_client.graph.environment import Secret
from lattice_client.services.llms import ENGINES

BUDGET_COLUMNS = ("requests", "tokens", "waiting")


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
@click.option("--requests-per-minute", type=click.IntRange(1), help="Requests a minute; more of them wait.")
@click.option("--tokens-per-minute", type=click.IntRange(1), help="Tokens of prompts and answers a minute.")
@click.option("--limit-window", type=FiniteRange(1, 3600), help="Seconds over which these are counted.  [60]")
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
        found = client.llm.list()
    if as_json:
        show_services(found, as_json)
    else:
        rows = ((*row_of(service), *_budget_row(service)) for service in found)
        show((*COLUMNS, *BUDGET_COLUMNS), rows, wrapped="detail")


def _budget_row(service: service_pb2.Service) -> tuple[str, ...]:
    """Return the use of a budget, and its limits of one window."""
    if not service.HasField("budget_use"):
        return "", "", ""
    use, limits = service.budget_use, service.spec.budget
    part = limits.window.ToTimedelta().total_seconds() / 60
    requests, tokens = (
        f"/{max(1, int(limit * part))}" if limit else ""
        for limit in (limits.requests_per_minute, limits.tokens_per_minute)
    )
    return f"{use.requests}{requests}", f"{use.tokens}{tokens}", str(use.waiting)


for shared in (show_service, scale, stop, logs):
    llm.add_command(shared)
