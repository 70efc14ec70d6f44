"""The examples, as a reader runs them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from lattice_client import LatticeClient, RunCancelledError
from tests.commands import LATTICE, START
from tests.ports import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"
OTHERS = ("agent_loop", "data_analysis", "debate", "embeddings", "rag", "research_agent")
DEMO = [sys.executable, str(ROOT / "scripts" / "demo.py")]
REPEATED = pytest.mark.exhaustive


def run_example(address: str, example: str, *arguments: str) -> str:
    """Run an example with `lattice run`, from an unrelated folder, and return its output."""
    command = [LATTICE, "run", "--addr", address, str(EXAMPLES / example / "main.py"), *arguments]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The other examples run with `lattice run` in tests of their own.
@pytest.mark.parametrize("example", ["agent", *(pytest.param(name, marks=REPEATED) for name in OTHERS)])
def test_an_example_runs_with_python_too(address: str, example: str) -> None:
    command = [sys.executable, str(EXAMPLES / example / "main.py")]
    environment = {**os.environ, "LATTICE_TARGET": address}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    ("arguments", "ending"),
    [([], "Done; published: "), pytest.param(["--refuse"], "Done; the report was refused", marks=REPEATED)],
)
def test_the_research_agent_publishes_only_when_it_is_approved(arguments: list[str], ending: str, local: str) -> None:
    shown = run_example(local, "research_agent", *arguments)
    assert re.search(r"- query: \[35(\.0)?, \"2015/", shown)
    assert re.search(r"- search: \S+\.md: \S", shown)
    assert "! publish this?" in shown
    assert ending in shown


@pytest.fixture(scope="module")
def answer(address: str) -> str:
    """The output of the agent for its default question."""
    return run_example(address, "agent")


def test_the_agent_answers_with_its_three_tools(answer: str) -> None:
    passage = re.search(r"→ (\S+\.md): (.*crash.*)", answer)
    assert passage
    assert any(
        passage[2] in " ".join(path.read_text().split()) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    )
    assert "like '2015%'\n  → 144\n" in answer
    assert "365 * 24 / 7\n  → 1251.4285714285713\n" in answer


def test_the_agent_shows_when_each_task_ran(answer: str) -> None:
    lines = re.findall(r"(\w+) +([\d.]+) to +([\d.]+) ms +█+", answer)
    begins = {name: float(begin) for name, begin, _ in lines}
    ends = {name: float(end) for name, _, end in lines}
    tools = {"search", "query", "calculate"}
    assert set(begins) == {"plan", "answer", *tools}
    assert all(ends["plan"] <= begins[tool] <= ends[tool] <= begins["answer"] for tool in tools)


def test_the_agent_uses_only_the_tools_it_needs(address: str) -> None:
    answer = run_example(address, "agent", "the warmest day in Seattle in 2014,", "(2 + 3) * 4.5")
    assert answer.partition("\n\n")[2] == (
        "select max(temp_max) from weather where date like '2014%'\n  → 35.6\n\n(2 + 3) * 4.5\n  → 22.5\n"
    )


def test_the_analysis_reports_the_figures_of_the_data(address: str) -> None:
    report = run_example(address, "data_analysis")
    assert "392 cars (14 incomplete ones left out)" in report
    assert re.search(r"USA +245 +9\.7 +12\.7 +15\.7", report)
    assert re.search(r"-0\.89 \+ +0\.0090 \* weight_kg +0\.78", report)


def test_retrieval_finds_the_passage(address: str) -> None:
    question = "the value as bytes in the encoding media type names, at most 256 KiB"
    path, line, text = re.findall(
        r"^[\d.]+  (\S+):(\d+)\n +(.*)$", run_example(address, "rag", question), re.MULTILINE
    )[0]
    assert path == "proto/lattice/v1/payload.proto"
    assert "at most 256 KiB" in text
    assert 1 < int(line) < len((ROOT / path).read_text().splitlines())


def test_embeddings_of_a_served_model_find_the_passage(address: str) -> None:
    question = "Which packages does a machine need if the head uses Ray?"
    shown = run_example(address, "embeddings", question)
    files, requests = re.findall(r"\((\d+) files, (\d+) requests\)", shown)[0]
    assert int(files) < int(requests) < 10 * int(files)
    assert re.findall(r"^[\d.]+  (\S+)\n", shown, re.MULTILINE)[0] == "docs/cluster.md"
    with LatticeClient(address) as client:
        assert not client.llm.list()


def test_the_agent_loop_answers_when_a_person_approves(local: str) -> None:
    assert run_example(local, "agent_loop").splitlines() == [
        "- calls 1 x primes_below",
        "- calls 25 x digit_sum",
        "- calls 1 x add_up",
        "- asks for approval of: 19, 37, 73; their sum is 129",
        "19, 37, 73; their sum is 129",
    ]


def test_the_debate_adds_rounds_until_the_estimates_agree(local: str) -> None:
    *rounds, verdict, tasks = run_example(local, "debate", "3").splitlines()
    estimates = [[float(number) for number in line.partition(": ")[2].split()] for line in rounds]
    spreads = [max(found) - min(found) for found in estimates]
    assert all(after < before for before, after in pairwise(spreads))
    assert spreads[-1] <= 3.05 < spreads[-2]
    assert verdict == f"about {sum(estimates[0]) / 4:.0f} rainy days a year, after {len(rounds)} rounds"
    assert tasks == f"{5 * len(rounds)} tasks, of which the workflow had 5"


def test_the_run_of_a_web_request_ends_with_its_client(local: str) -> None:
    port = free_port()
    command = [sys.executable, str(EXAMPLES / "web" / "main.py"), str(port)]
    service = subprocess.Popen(command, env={**os.environ, "LATTICE_TARGET": local})
    retrying = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
    try:
        with retrying as web, LatticeClient(local) as client:
            found = _once_listening(lambda: web.get("/count", params={"words": "to be"}), service).json()
            assert found["result"] == {"0-to": {"result": 2}, "1-be": {"result": 2}}
            assert web.get("/stream", params={"words": "or not"}).text == "or not "
            before = _counts(client)
            with socket.create_connection(("127.0.0.1", port)) as leaving:
                leaving.sendall(b"GET /count?words=left&seconds=600 HTTP/1.1\r\nHost: localhost\r\n\r\n")
                while not (counted := _counts(client) - before):
                    time.sleep(0.05)
            with web.stream("GET", "/stream", params={"words": "or not " * 99, "seconds": 0.2}) as answer:
                streamed = client.get_run(answer.headers["run-id"])
                assert next(answer.iter_text()) == "or "
            for run, why in (
                (client.get_run(counted.pop()), "its caller was disconnected"),
                (streamed, "client left"),
            ):
                with pytest.raises(RunCancelledError, match=why):
                    run.result(timeout=60)
    finally:
        service.terminate()
        service.wait(30)


def _counts(client: LatticeClient) -> set[str]:
    """Return the runs of the path `/count`."""
    return {run.run_id for run in client.list_runs(5) if run.display_name == "count"}


def _once_listening(call: Callable[[], httpx.Response], service: subprocess.Popen[bytes]) -> httpx.Response:
    """Repeat a call until the service listens."""
    while True:
        try:
            return call()
        except httpx.ConnectError:
            assert service.poll() is None
            time.sleep(0.05)


def test_the_demo_gives_the_right_answer_when_its_server_is_killed_in_the_middle(tmp_path: Path) -> None:
    port = free_port()
    flags = ["--port", str(port), "--journal", str(tmp_path / "journal")]
    with subprocess.Popen([*DEMO, *flags], stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        next(line for line in demo.stdout if "listening" in line)
        with LatticeClient(f"127.0.0.1:{port}") as client:
            server = client.server_info().pid
            while not (runs := list(client.list_runs(1))):
                time.sleep(0.01)
            next(event for event in client.get_run(runs[0].run_id).events() if event.type == "task_started")
        killed_s = time.time()
        os.kill(server, signal.SIGKILL)
        while _listens(port):
            time.sleep(0.02)
        again = subprocess.Popen([*START, "--head", *flags], stdout=subprocess.DEVNULL)
        try:
            shown = demo.stdout.read()
            assert demo.wait(100) == 0, shown
            with LatticeClient(f"127.0.0.1:{port}") as client:
                last = list(client.get_run(runs[0].run_id).events())[-1]
        finally:
            again.terminate()
            again.wait(60)
    assert "→ 144" in shown
    assert last.time_s > killed_s, "it was not in the middle"


def _listens(port: int) -> bool:
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) == 0


def test_the_demo_runs_and_cleans_up() -> None:
    done = subprocess.run(DEMO, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "→ 144" in done.stdout
    assert done.stdout.endswith("The server and its workers have stopped.\n")
