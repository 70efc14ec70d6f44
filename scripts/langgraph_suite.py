"""Runs LangGraph's own tests with every graph compiled through Lattice, and counts.

    pip download langgraph==1.2.24 --no-binary langgraph --no-deps && tar xzf langgraph-1.2.24.tar.gz
    scripts/langgraph_suite.py langgraph-1.2.24 [arguments of pytest, such as tests/test_pregel.py]

Remove the folder `langgraph` of the archive first: workers and tests use the installed package. The tests need the
packages langgraph-checkpoint-sqlite, langgraph-checkpoint-postgres, psycopg[binary], psycopg-pool, redis, syrupy,
pytest-mock, pytest-dotenv and pycryptodome. Nothing of LangGraph's repository is kept here.
This file is also the pytest plugin that compiles the graphs. A node whose code cannot be sent stays in the process of
the test; the counts tell the tests in which a node ran on Lattice.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

TARGET = "LATTICE_SUITE_TARGET"
REPORT = "LATTICE_SUITE_REPORT"
MAX_TEXT = 6000


class Suite:
    """Compiles graphs through Lattice, and counts the calls of nodes of each test."""

    def __init__(self, target: str, report: Path) -> None:
        from lattice_client import LangGraphClient

        self._lattice = LangGraphClient(target)
        self._report = report
        self._calls = 0
        self._refused: list[str] = []

    def install(self) -> None:
        """Have LangGraph compile through Lattice."""
        from langgraph.func import entrypoint
        from langgraph.graph import StateGraph

        from lattice_client.langgraph.invocation import Invocation
        from lattice_client.langgraph.stubs import Runner

        compile_, start, make = StateGraph.compile, Invocation.start, entrypoint.__call__

        def counted(invocation: Any, *args: Any, **kwargs: Any) -> Any:
            self._calls += 1
            return start(invocation, *args, **kwargs)

        Invocation.start = counted  # type: ignore[method-assign]
        Runner.task_stub = self.with_tasks(Runner.task_stub)  # type: ignore[method-assign]
        StateGraph.compile = lambda *args, **kwargs: self.compiled(compile_(*args, **kwargs))  # type: ignore
        entrypoint.__call__ = lambda *args, **kwargs: self.compiled(make(*args, **kwargs))  # type: ignore

    def with_tasks(self, stub_of: Any) -> Any:
        """Return `Runner.task_stub` for which a `@task` that cannot run on Lattice stays in this process."""
        from lattice_client import TaskDefinitionError

        def task_stub(runner: Any, function: Any, *more: Any) -> Any:
            try:
                return stub_of(runner, function, *more)
            except TaskDefinitionError as error:
                self._refused.append(str(error))
                return function

        return task_stub

    def compiled(self, graph: Any) -> Any:
        """Return a compiled graph of which as many nodes as possible run on Lattice."""
        from lattice_client import TaskDefinitionError
        from lattice_client.langgraph.compiling import LatticeGraph, Plan, _node

        if isinstance(graph, LatticeGraph):
            return graph
        runner, local = self._lattice._runner, []
        # The body of an entrypoint stays here in any case.
        for name, node in graph.nodes.items() if hasattr(graph, "builder") else ():
            try:
                _node(runner, name, node, Plan.of({}, {"cpu": 0.01}, "none", ()), "")
            except TaskDefinitionError as error:
                local.append(name)
                self._refused.append(str(error))
        try:
            return self._lattice.compile(graph, default={"cpu": 0.01}, local=local)
        except TaskDefinitionError as error:
            self._refused.append(str(error))
            return graph

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
        """Note the outcome of a test."""
        report = yield
        if report.when == "call" or report.outcome != "passed":
            text = str(report.longrepr)[-MAX_TEXT:] if report.outcome == "failed" else ""
            found = {"test": item.nodeid, "outcome": report.outcome, "calls": self._calls, "text": text}
            found["refused"] = sorted(set(self._refused))
            with self._report.open("a") as file:
                file.write(json.dumps(found) + "\n")
        return report

    @pytest.hookimpl
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Count the calls of each test apart."""
        self._calls = 0
        self._refused = []

    def pytest_unconfigure(self) -> None:
        """End the connection."""
        self._lattice.close()


def pytest_configure(config: pytest.Config) -> None:
    """Install the plugin."""
    suite = Suite(os.environ[TARGET], Path(os.environ[REPORT]))
    suite.install()
    config.pluginmanager.register(suite)


def main() -> int:
    """Start a server, run the tests, print the counts."""
    folder, *arguments = sys.argv[1:]
    report = Path(folder).resolve() / "lattice-report.jsonl"
    report.unlink(missing_ok=True)
    command = [Path(sys.executable).parent / "lattice", "start", "--head", "--port", "0", "--executor", "local"]
    server = subprocess.Popen([*command, "--num-cpus", "8"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.search(r"127\.0\.0\.1:\d+", line)
        assert found, f"the server said {line!r}"
        environment = {
            **os.environ,
            TARGET: found.group(),
            REPORT: str(report),
            "NO_DOCKER": "true",
            "LANGGRAPH_DEFAULT_RECURSION_LIMIT": "50",
            "PYTHONPATH": os.pathsep.join([folder, str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        }
        flags = [
            "-q",
            "-p",
            "langgraph_suite",
            "-o",
            "addopts=",
            "--tb=native",
            "--timeout=30",
            "-p",
            "no:cacheprovider",
        ]
        pytest_ = [sys.executable, "-m", "pytest", *flags, *(arguments or ["tests"])]
        subprocess.run(pytest_, cwd=folder, env=environment, check=False)
    finally:
        server.terminate()
        server.wait(30)
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    results = {found["test"]: found for found in lines}.values()  # an error in the teardown replaces the outcome
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    for found in results:
        where = "a node ran on Lattice" if found["calls"] else "no node ran on Lattice"
        groups[f"{where}, {'a node was refused' if found['refused'] else 'none was refused'}"][found["outcome"]] += 1
    for title, counts in sorted(groups.items()):
        print(f"{title}: {counts.total()} tests, {dict(counts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
