"""Models on the server of transformers, with a real tiny model: its paths, loads, losses, faults and ends.

`make models` installs it. The other tests of models use a small server of the same API.
"""

import json
import os
import re
import signal
import subprocess
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
import pytest
from lattice.v1 import service_pb2

from lattice_client import LatticeClient, ServiceFailedError, context, task
from tests.e2e.conftest import served
from tests.e2e.rooms import WAIT_S, Room, note, noted
from tests.e2e.test_examples import run_example
from tests.e2e.test_llms import chunks, post
from tests.e2e.test_services import ready, until

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / ".venv-models" / "bin"
MAKER = ROOT / "examples" / "research_agent" / "tiny_model.py"
CACHE = "TORCHINDUCTOR_CACHE_DIR"  # Else torch leaves a folder in that of all temporary files.
IDLE = service_pb2.SERVICE_STATE_IDLE
# A pool shrinks so long after its instances are no longer needed; 60 s by default.
SHRINK_DELAY_S = 5
START_S = 150.0  # An engine imports torch first, which takes a minute on a busy machine.

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not (MODELS / "transformers").exists(), reason="transformers is not there: make models"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the tiny model."""
    made = str(tmp_path_factory.mktemp("tiny"))
    environment = {**os.environ, CACHE: made}
    subprocess.run([MODELS / "python", MAKER, made], check=True, capture_output=True, timeout=120, env=environment)
    return made


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LatticeClient]:
    """A client of a server whose tasks find `transformers`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{MODELS}{os.pathsep}{os.environ['PATH']}")
        patch.setenv(CACHE, str(tmp_path_factory.mktemp("cache")))
        patch.setenv("LATTICE_SHRINK_DELAY_S", str(SHRINK_DELAY_S))
        with served("--executor", "local", "--num-cpus", "4") as address, LatticeClient(address) as client:
            yield client


@pytest.fixture
def server(running: LatticeClient) -> Iterator[LatticeClient]:
    """That client; no process and no port of a model is left after the test."""
    before = engines()
    yield running
    every = [process for process in engines() if process not in before]
    for service in running.services.list():
        running.services.stop(service.spec.name, timeout=WAIT_S)
    assert not psutil.wait_procs(every, timeout=10)[1]
    until(lambda: all(node.free == node.capacity for node in running.nodes()), "the node is free again")


def engines() -> list[psutil.Process]:
    """Return the processes of transformers below this process."""
    return [one for one in psutil.Process().children(recursive=True) if "serve" in _command(one)]


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def start(client: LatticeClient, folder: str, **settings: Any) -> service_pb2.Service:
    chosen: dict[str, Any] = {"engine": "transformers", "cpu": 0.5, "timeout": START_S}
    return client.llm.start(settings.pop("name", "tiny"), folder, **(chosen | settings))


@task(cpu=0.1)
def ask(paths: list[str], tokens: int, **more: Any) -> list[Any]:
    """Put one question on several paths; return the statuses and the answers."""
    found = context.llm("tiny")
    questions = {
        "chat/completions": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": tokens},
        "completions": {"prompt": "hello", "max_tokens": tokens},
        "responses": {"input": "hello", "max_output_tokens": tokens},
        "embeddings": {"input": "hello"},
    }
    bodies = [{"model": "tiny", **questions[path], **more} for path in paths]
    return [list(post(found.base_url, found.api_key, *one)) for one in zip(paths, bodies, strict=True)]


@task(cpu=0.1)
def listen(room: str, tokens: int) -> list[Any]:
    """Read a stream of so many tokens; return its instance, the code of its error, and its reason to finish."""
    found = context.llm("tiny")
    message = {"role": "user", "content": "hello"}
    body = {"model": "tiny", "messages": [message], "max_tokens": tokens, "stream": True}
    headers = {"authorization": f"Bearer {found.api_key}", "content-type": "application/json"}
    request = urllib.request.Request(f"{found.base_url}/chat/completions", json.dumps(body).encode(), headers)
    error = reason = None
    with urllib.request.urlopen(request, timeout=WAIT_S) as response:
        instance = response.headers["x-lattice-instance"]
        for number, line in enumerate(one for one in response if one.startswith(b"data: {")):
            if number == 1:
                note(room, instance)
            event = json.loads(line[6:])
            error = event["error"]["code"] if "error" in event else error
            for choice in event.get("choices", ()):
                reason = choice.get("finish_reason") or reason
    return [instance, error, reason]


def run_ask(client: LatticeClient, *paths: str, **more: Any) -> list[Any]:
    return list(client.run_task(ask, {"paths": list(paths), "tokens": 8, **more})["result"])


def pid_of(instance: service_pb2.ServiceInstance) -> int:
    """Return the process that listens at the address of an instance."""
    port = int(instance.endpoint.rpartition(":")[2])
    for process in engines():
        if any(one.laddr.port == port and one.status == "LISTEN" for one in process.net_connections()):
            return process.pid
    raise AssertionError(f"no engine listens on port {port}")


def test_all_paths_of_the_api_are_passed_on_and_the_engine_writes_into_the_log(
    server: LatticeClient, folder: str
) -> None:
    start(server, folder, tokens_per_minute=10_000)
    paths = ("chat/completions", "completions", "responses", "embeddings")
    chat, completion, response, embedding = run_ask(server, *paths, stream=False)
    assert [chat[0], completion[0], response[0], embedding[0]] == [200, 200, 200, 404]
    (choice,) = json.loads(chat[1])["choices"]
    assert (choice["finish_reason"], bool(choice["message"]["content"])) == ("length", True)
    assert json.loads(completion[1])["choices"][0]["finish_reason"] == "length"
    assert json.loads(response[1])["status"] == "completed"
    (streamed, events) = run_ask(server, "chat/completions", "responses", stream=True)
    (*_, last) = [chunk for chunk in chunks(streamed[1]) if chunk != "[DONE]" and chunk["choices"]]
    assert last["choices"][0]["finish_reason"] == "length"
    assert chunks(events[1])[-1]["type"] == "response.completed"
    lines = [line.text for line in server.services.logs("tiny")]
    assert any("POST /v1/responses" in line for line in lines)
    # Each answer reports its tokens; that the engine has no path for embeddings used none of the budget for long.
    until(lambda: not server.services.get("tiny").budget_use.open, "the end of the last answer is reported")
    use = server.services.get("tiny").budget_use
    assert (use.permitted, use.refused) == (6, 0)


def test_other_answers_are_whole_when_one_of_two_engines_is_killed_in_mid_answer(
    server: LatticeClient, folder: str, room: Room
) -> None:
    start(server, folder, replicas=2, concurrency=2)
    first, second = until(lambda: (both := ready(server.services.get("tiny")))[1:] and both, "both are ready")
    runs = []
    for number in range(2):
        workflow = server.create_workflow()
        workflow.add_task(listen, {"room": room, "tokens": 1500})
        runs.append(workflow.run())
        until(lambda count=number: len(room.notes()) > count, "its stream has begun")
    assert {*room.notes()} == {first.instance_id, second.instance_id}
    os.kill(pid_of(first), signal.SIGKILL)
    answers = {found[0]: found[1:] for found in (run.result(timeout=WAIT_S)["result"] for run in runs)}
    assert answers == {first.instance_id: ["replica_lost", None], second.instance_id: [None, "length"]}
    until(lambda: len(ready(server.services.get("tiny"))) == 2, "another one is ready")


def test_request_waits_for_the_next_engine_when_the_only_one_was_just_killed(
    server: LatticeClient, folder: str
) -> None:
    (instance,) = ready(start(server, folder))
    assert run_ask(server, "chat/completions")[0][0] == 200
    os.kill(pid_of(instance), signal.SIGKILL)
    assert run_ask(server, "chat/completions")[0][0] == 200
    assert server.services.get("tiny").restarts == 1


def test_model_without_use_has_no_engine_until_a_request_starts_one(server: LatticeClient, folder: str) -> None:
    start(server, folder, replicas=0, idle_timeout=1.0, wait=False)
    assert server.services.get("tiny").state == IDLE
    assert not engines()
    runs = []
    for _ in range(3):
        workflow = server.create_workflow()
        workflow.add_task(ask, {"paths": ["chat/completions"], "tokens": 2})
        runs.append(workflow.run())
    assert [run.result(timeout=WAIT_S)["result"][0][0] for run in runs] == [200] * 3
    until(lambda: server.services.get("tiny").state == IDLE, "it is idle again")
    until(lambda: not engines(), "its process is gone")
    assert server.services.get("tiny").restarts == 0


def test_pool_grows_under_load_and_shrinks_after_it(server: LatticeClient, folder: str, room: Room) -> None:
    start(server, folder, max_replicas=2, concurrency=1)
    is_over, statuses = Event(), Counter[Any]()

    def use() -> None:
        while not is_over.is_set():
            found = server.run_task(listen, {"room": room, "tokens": 300})["result"]
            statuses[found[1], found[2]] += 1

    threads = [Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: len({*room.notes()}) == 2, "a second engine answers")
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert {*statuses} == {(None, "length")}
    until(lambda: len(ready(server.services.get("tiny"))) == 1, "one engine is left")


def test_engine_that_fails_at_start_is_a_typed_error_with_its_last_lines(server: LatticeClient, folder: str) -> None:
    def error_of(name: str, model: str, arguments: Sequence[str]) -> ServiceFailedError:
        with pytest.raises(ServiceFailedError) as caught:
            start(server, model, name=name, arguments=arguments)
        return caught.value

    # Each engine imports torch before it fails.
    with ThreadPoolExecutor(2) as both:
        missing = both.submit(error_of, "missing", f"{folder}/missing", ())
        wrong = both.submit(error_of, "wrong", folder, ["--no-such-flag"])
    assert missing.result().kind == "model_not_found"
    assert any("missing" in line for line in missing.result().last_lines)
    assert wrong.result().kind == "bad_arguments"


def test_engine_that_hangs_gets_no_requests_and_is_replaced(server: LatticeClient, folder: str, room: Room) -> None:
    checks = {"health_interval": 0.5, "health_timeout": 0.5, "health_failures": 2}
    (hanging,) = ready(start(server, folder, **checks))
    workflow = server.create_workflow()
    workflow.add_task(listen, {"room": room, "tokens": 4000})
    run = workflow.run()
    noted(room, hanging.instance_id)
    os.kill(pid_of(hanging), signal.SIGSTOP)
    # The answer that it has begun ends with an error, and the next one is that of another engine.
    assert run.result(timeout=WAIT_S)["result"] == [hanging.instance_id, "replica_lost", None]
    assert server.run_task(listen, {"room": room, "tokens": 2})["result"][1:] == [None, "length"]
    assert server.services.get("tiny").restarts == 1


def test_research_agent_adds_a_remark_of_two_served_instances(server: LatticeClient, folder: str) -> None:
    shown = run_example(server.target, "research_agent", "--model", folder)
    assert re.search(r"Done; published: [^\n]*\nwriter says: .", shown)
    assert not server.llm.list()
