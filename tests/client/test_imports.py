"""The imports of the client: it works without POSIX modules, and without packages that only the server needs."""

import subprocess
import sys

import pytest
from click import Context

from lattice_client.cli.groups import LazyGroup
from lattice_client.cli.main import main
from lattice_client.cli.runs import runs

# Modules that Windows lacks, and functions of `os` and `signal`.
WITHOUT_POSIX = """
import os, signal, sys
for name in ("fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "syslog"):
    sys.modules[name] = None
for module, names in (
    (os, ("fork", "forkpty", "register_at_fork", "getuid", "geteuid", "killpg", "setsid")),
    (signal, ("pthread_kill", "pthread_sigmask", "sigwait", "SIGHUP", "SIGUSR1")),
):
    for name in names:
        delattr(module, name)
"""
# Packages of the server and the worker, and of optional features.
WITHOUT_SERVER = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked")
BLOCKED = {
    "ray", "networkx", "uvloop", "psutil", "opentelemetry", "langgraph", "orjson", "pynvml", "pythonjsonlogger",
    "asyncinotify", "grpc_interceptor", "grpc_health", "grpc_reflection", "lattice_server", "lattice_worker", "numpy",
}
sys.meta_path.insert(0, Blocked())
"""
IMPORT_ALL = """
import importlib, pkgutil
import lattice_client
names = [found.name for found in pkgutil.walk_packages(lattice_client.__path__, "lattice_client.")]
# The other modules of this package need the extra.
names = [name for name in names if not name.startswith("lattice_client.langgraph.")]
for name in names:
    importlib.import_module(name)
print(len(names) > 50)
"""
SHOW_HELP = """
from lattice_client.cli.main import main
main(["--help"], prog_name="lattice")
"""
PACK = """
from lattice_client import LatticeClient, task

@task(retries=1)
def double(value: int) -> int:
    return 2 * value

workflow = LatticeClient("127.0.0.1:1").create_workflow()
first = workflow.add_task(double, {"value": 1})
workflow.add_task(double, {"value": first.output})
function, bundle = double.pack()
print(bool(function.python.pickle), len(workflow.tasks))
"""


# Prints which of the packages that take long a command has imported.
COMMAND = """
import sys
from lattice_client.cli.main import main
main({arguments!r}, prog_name="lattice", standalone_mode=False)
print("imported:", *sorted({{"grpc", "ray", "opentelemetry", "rich.table"}} & sys.modules.keys()))
"""
DECLARE = """
import sys
from lattice_client import context, task
@task
def double(x: int) -> int:
    return 2 * x
print("imported:", *sorted({"grpc", "rich", "click", "lattice_client.sync"} & sys.modules.keys()))
"""


def output_of(program: str) -> str:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("missing", [WITHOUT_POSIX, WITHOUT_SERVER], ids=["posix", "server"])
@pytest.mark.parametrize(
    ("program", "printed"),
    [(IMPORT_ALL, "True\n"), (SHOW_HELP, "Usage: lattice"), (PACK, "True 2\n")],
    ids=["import", "help", "pack"],
)
def test_client_works_when_modules_are_missing(missing: str, program: str, printed: str) -> None:
    assert output_of(missing + program).startswith(printed)


@pytest.mark.parametrize("arguments", [["--version"], ["--help"]], ids=" ".join)
def test_lattice_imports_no_command_when_it_runs_none(arguments: list[str]) -> None:
    assert output_of(COMMAND.format(arguments=arguments)).endswith("\nimported:\n")


def test_task_is_declared_without_the_connection_to_a_server() -> None:
    assert output_of(DECLARE) == "imported:\n"


def test_node_of_langgraph_runs_without_the_connection_to_a_server() -> None:
    program = """
import sys
import lattice_client.langgraph.remote
print("imported:", *sorted({"grpc", "lattice_client.sync", "lattice_client.langgraph.client"} & sys.modules.keys()))
"""
    assert output_of(program) == "imported:\n"


@pytest.mark.parametrize("group", [main, runs], ids=lambda group: group.name)
def test_summary_of_a_command_is_the_first_sentence_of_its_help(group: LazyGroup) -> None:
    context = Context(group)
    for name, (_, summary) in group.lazy.items():
        command = group.get_command(context, name)
        assert command is not None
        assert (command.name, summary) == (name, command.get_short_help_str(1000))


@pytest.mark.parametrize("use", ["task(lambda state: state)", "compile(None)"])
def test_use_of_langgraph_without_it_names_the_extra(use: str) -> None:
    program = f"""
import sys
sys.modules["langgraph"] = None
from lattice_client import LangGraphClient
try:
    LangGraphClient("127.0.0.1:1").{use}
except ModuleNotFoundError as error:
    print(error)
"""
    needed = 'LangGraphClient needs more packages: pip install "lattice-control-plane[langgraph]" ('
    assert output_of(program).startswith(needed)
