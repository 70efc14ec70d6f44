"""Importing the packages changes no environment variable, which programs that are started then would inherit."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import importlib, json, os, pkgutil, sys
# Ray has its own, and is not this project.
before = dict(os.environ)
package = importlib.import_module(sys.argv[1])
names = [found.name for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
for name in names:
    if not name.endswith(("__main__", "runner.spawned", "worker.doctor")):  # programs
        importlib.import_module(name)
changed = sorted(name for name, _ in set(before.items()) ^ set(os.environ.items()) if not name.startswith("RAY_"))
print(json.dumps([len(names), changed]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("package", ["lattice.v1", "lattice_client", "lattice_worker", "lattice_server"])
def test_importing_a_package_changes_no_environment_variable(package: str) -> None:
    command = [sys.executable, "-c", PROGRAM, package]
    bare = {name: value for name, value in os.environ.items() if not name.startswith("GRPC_")}
    done = subprocess.run(command, env=bare, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    count, changed = json.loads(done.stdout)
    assert count > 10
    assert changed == []
