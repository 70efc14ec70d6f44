"""Each package runs with its own extra only. A separate process blocks the modules of the other extras."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

WORKER = {"aiohttp", "cryptography", "h11", "orjson", "psutil", "pynvml", "uvloop"}
SERVER = {
    "asyncinotify",
    "grpc_health",
    "grpc_interceptor",
    "grpc_reflection",
    "grpc_status",
    "networkx",
    "opentelemetry",
}
OTHERS = {"langgraph", "ray"}

PROGRAM = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder

class Filtered(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {blocked!r} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Filtered
{body}
"""
EVERY_MODULE = """
for package in {packages!r}:
    imported = importlib.import_module(package)
    for found in pkgutil.walk_packages(imported.__path__, f"{{package}}."):
        is_of_extra = found.name.startswith("lattice_client.langgraph.")
        if not is_of_extra and not found.name.endswith(("__main__", "runner.spawned")):
            importlib.import_module(found.name)
"""
COMMAND = "sys.argv = {argv!r}\nfrom lattice_client.cli.main import main\nmain()"


def _run(blocked: set[str], body: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM.format(blocked=sorted(blocked), body=body)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("packages", "blocked"),
    [
        (["lattice.v1", "lattice_client"], WORKER | SERVER | OTHERS),
        (["lattice.v1", "lattice_worker"], SERVER | OTHERS),
        (["lattice.v1", "lattice_server.engine", "lattice_server.rpc"], OTHERS),
    ],
    ids=["client", "worker", "server"],
)
def test_every_module_imports_when_only_its_own_extra_is_installed(packages: list[str], blocked: set[str]) -> None:
    done = _run(blocked, EVERY_MODULE.format(packages=packages))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "blocked"),
    [
        ("lattice_server.cli", SERVER | OTHERS),
        ("lattice_server.executors.ray_actor", SERVER | OTHERS - {"ray"}),
        ("lattice_server.app", OTHERS),
    ],
)
def test_a_module_that_a_machine_runs_imports_when_the_other_extras_are_absent(module: str, blocked: set[str]) -> None:
    done = _run(blocked, f"import {module}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["start", "--head"], ["start", "--help"], ["stop"]])
def test_a_command_says_which_extra_to_install_when_it_is_absent(arguments: list[str]) -> None:
    done = _run(WORKER | SERVER | OTHERS, COMMAND.format(argv=["lattice", *arguments]))
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f'Error: `lattice {arguments[0]}` needs more packages: pip install "lattice-control-plane[server]"'
    )


def test_the_commands_are_listed_when_no_extra_is_installed() -> None:
    done = _run(WORKER | SERVER | OTHERS, COMMAND.format(argv=["lattice", "--help"]))
    assert done.returncode == 0, done.stderr
    assert "  runs " in done.stdout


def test_a_head_says_how_to_get_ray_when_ray_is_absent() -> None:
    done = _run(OTHERS, COMMAND.format(argv=["lattice", "start", "--head", "--port", "0"]))
    # The command replaces its process by one in which nothing is blocked, unless it fails before.
    assert done.returncode == 1
    assert 'pip install "lattice-control-plane[ray]", or start with --executor local' in done.stderr
