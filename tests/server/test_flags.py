"""The options of `lattice start` that are refused because they have no effect."""

import subprocess
import sys

import click
import pytest

from lattice_server.cli import start
from lattice_server.config import ServerConfig
from lattice_server.flags import check_effects


@pytest.mark.parametrize(
    ("options", "config", "needed"),
    [
        ("--node-ip 127.0.0.1", ServerConfig(executor="local"), "--executor ray"),
        ("--ray-workers 2", ServerConfig(executor="ray"), "--ray-address"),
        ("--metrics-address 127.0.0.1:0", ServerConfig(metrics="otlp"), "--metrics prometheus"),
        ("--journal-sync normal", ServerConfig(journal="memory"), "a journal, and this server has none"),
    ],
)
def test_an_option_without_an_effect_is_refused(options: str, config: ServerConfig, needed: str) -> None:
    given = start.make_context("start", ["--head", *options.split()])
    with pytest.raises(click.UsageError, match=f"{options.split(maxsplit=1)[0]} has no effect without {needed}"):
        check_effects(given, config)


def test_an_option_is_accepted_when_it_has_an_effect() -> None:
    options = "--node-ip 127.0.0.1 --ray-workers 2 --metrics-address 127.0.0.1:0 --journal-sync normal"
    config = ServerConfig(executor="ray", ray_address="127.0.0.1:1", metrics="prometheus", journal="/folder")
    check_effects(start.make_context("start", ["--head", *options.split()]), config)


def test_a_setting_of_a_file_may_have_no_effect() -> None:
    config = ServerConfig(metrics="none", metrics_address="127.0.0.1:0", journal="memory", journal_sync="normal")
    check_effects(start.make_context("start", ["--head"]), config)


def test_the_server_is_not_started_with_such_an_option() -> None:
    command = [sys.executable, "-m", "lattice_server", "start", "--head", "--port", "0", "--journal-sync", "normal"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "--journal-sync has no effect without a journal" in done.stderr
