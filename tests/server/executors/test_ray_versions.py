"""The private names of Ray that Lattice uses, and the versions of Ray in which they were checked."""

import importlib
import inspect
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent.parent
# Replaced or read by `lattice_server/executors/ray_driver.py` and `lattice_worker/machine/ray_node.py`.
PRIVATE = [
    ("ray._private.services", "resolve_ip_for_localhost"),
    ("ray._private.worker", "_global_node"),
    ("ray.scripts.scripts", "main"),
]
ADVICE = "Ray {} has no {}.{}: adapt the two modules named in this test, or bound Ray in pyproject.toml below it"


@pytest.mark.parametrize(("module", "name"), PRIVATE)
def test_ray_has_each_private_name_that_lattice_uses(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name), ADVICE.format(metadata.version("ray"), module, name)


def test_ray_passes_one_address_when_it_resolves_loopback() -> None:
    services = importlib.import_module("ray._private.services")
    assert list(inspect.signature(services.resolve_ip_for_localhost).parameters) == ["host"]
    init = inspect.getsource(importlib.import_module("ray._private.worker").init)
    assert "services.resolve_ip_for_localhost(" in init, "replacing the function no longer binds Ray to loopback"


def test_ray_lists_its_processes_when_it_has_started_a_node() -> None:
    node = importlib.import_module("ray._private.node")
    assert "self.all_processes" in inspect.getsource(node.Node.__init__)
    assert "process" in importlib.import_module("ray._private.services").ProcessInfo._fields


def test_ray_is_bounded_on_both_sides() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (ray,) = project["optional-dependencies"]["ray"]
    bounds = ray.removeprefix("ray[default]")
    low, high = (tuple(map(int, bound.lstrip("<>=").split("."))) for bound in bounds.split(","))
    installed = tuple(map(int, metadata.version("ray").split(".")[:2]))
    assert bounds.startswith(">=")
    assert low <= installed < high
