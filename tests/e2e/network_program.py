"""A program: tasks with a list of servers, through a server and its worker, on an internet of the tests' own.

It prints what their callers see as JSON.
"""

import json
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle

from lattice_client import LatticeClient, LatticeError, context, task
from tests.e2e.conftest import served
from tests.sandbox.internet import internet

LEVELS = ("subprocess", "seccomp")


def fetch(url: str) -> str:
    """Return the answer to a request, or the refusal of the proxy."""
    try:
        return urllib.request.urlopen(url, timeout=20).read().decode()
    except urllib.error.HTTPError as error:
        return f"refused: {error.headers['X-Lattice-Network']}"


def fetch_both(url: str, other: str) -> list[str]:
    """Return two answers."""
    return [fetch(url), fetch(other)]


def open_and_wait(url: str) -> None:
    """Have an answer, and hang."""
    fetch(url)
    time.sleep(60)


def spawn_wider() -> list[str]:
    """Have another task connect to a server that this one may not connect to."""
    wider = task(isolation="seccomp", network=["api.test:80", "a.wild.test:80"])(fetch_both)
    context.spawn(wider, {"url": "http://api.test/", "other": "http://a.wild.test/"}, name="child")
    return []


def run(client: LatticeClient, function: Callable[..., Any], inputs: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """Return the outputs or the error of a task, and its events about the network."""
    workflow = client.create_workflow()
    workflow.add_task(task(**settings)(function), inputs, "t")
    started = workflow.run()
    found: dict[str, Any] = {}
    try:
        found["result"] = started.result(timeout=60)
    except LatticeError as error:
        found["error"] = str(error)
    events = list(started.events())
    found["accesses"] = [dict(event.data) for event in events if event.type == "task_network_access"]
    found["types"] = [event.type for event in events if event.type != "task_log"]
    return found


def refused(client: LatticeClient, servers: list[str], level: str) -> str:
    """Return why a task is refused."""
    try:
        client.run_task(task(isolation=level, network=servers)(fetch), {"url": ""})
    except LatticeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    """Run all scenarios."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    found: dict[str, Any] = {}
    both = {"url": "http://api.test/x", "other": "http://other.test/"}
    with (
        tempfile.TemporaryDirectory(prefix="lattice-tests-") as folder,
        internet(Path(folder)),
        served("--executor", "local", "--num-cpus", "2") as address,
        LatticeClient(address) as client,
    ):
        for level in LEVELS:
            found[level] = run(client, fetch_both, both, isolation=level, network=["API.test:80"])
        api = {"url": "http://api.test/"}
        found["timeout"] = run(client, open_and_wait, api, isolation="seccomp", network=["api.test:80"], timeout=4)
        found["spawn"] = run(client, spawn_wider, {}, isolation="seccomp", network=["api.test:80"])
        found["none"] = run(client, fetch_both, both, isolation="seccomp")
        found["docker"] = refused(client, ["api.test:80"], "docker")
        found["nodes"] = [list(node.network_isolations) for node in client.nodes()]
        for name, servers in {"address": ["1.2.3.4:443"], "port": ["api.test"], "many": ["a.b:1"] * 65}.items():
            found[name] = refused(client, servers, "seccomp")
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    os.environ["LATTICE_DOCKER_HOST"] = ""
    main()
