"""Language models: engines as commands, the gateway of a node, its keys, lost answers, and cold starts."""

import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from click.testing import CliRunner
from lattice.v1 import service_pb2, task_pb2

from lattice_client import (
    InvalidArgumentError,
    LatticeClient,
    ServiceFailedError,
    TaskFailedError,
    context,
    secret,
    task,
)
from lattice_client.cli.main import main
from tests.e2e.rooms import WAIT_S, Room, enter, note
from tests.e2e.test_services import until

SERVER = str(Path(__file__).parent.parent / "tools" / "openai_server.py")
COMMAND = [sys.executable, SERVER, "{host}", "{port}"]


@pytest.fixture
def started(client: LatticeClient) -> Iterator[Callable[..., service_pb2.Service]]:
    """Starts models of small instances, and stops all when the test ends."""

    def start(name: str, *arguments: str, **settings: Any) -> service_pb2.Service:
        chosen = {"cpu": 0.1, "timeout": WAIT_S, "command": COMMAND, "arguments": arguments} | settings
        return client.llm.start(name, **chosen)

    yield start
    for service in client.services.list():
        client.services.stop(service.spec.name, timeout=WAIT_S)


def post(base_url: str, key: str, path: str, body: dict[str, Any]) -> tuple[int, str]:
    """Return the status and the body of an answer."""
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    request = urllib.request.Request(f"{base_url}/{path}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@task(cpu=0.1)
def chat(name: str, text: str, stream: bool = False, model: str = "", path: str = "chat/completions") -> list[Any]:
    found = context.llm(name)
    message = {"role": "user", "content": text}
    body = {"model": model or found.model, "messages": [message], "input": text, "stream": stream}
    return [found.base_url, found.api_key, *post(found.base_url, found.api_key, path, body)]


@task(cpu=0.1)
def chat_twice(name: str, room: Room) -> list[str]:
    """Chat before and after the room opens."""
    found = context.llm(name)
    body = {"model": found.model, "messages": [{"role": "user", "content": "who"}]}
    answers = [post(found.base_url, found.api_key, "chat/completions", body)[1]]
    note(room, "asked")
    enter(room, "asked")
    answers.append(post(found.base_url, found.api_key, "chat/completions", body)[1])
    return [json.loads(answer)["system_fingerprint"] for answer in answers]


def answer(client: LatticeClient, *arguments: Any, **more: Any) -> tuple[int, str]:
    inputs = dict(zip(("name", "text"), arguments, strict=True)) | more
    found = client.run_task(chat, inputs)["result"]
    return found[2], found[3]


def chunks(text: str) -> list[Any]:
    """Return the events of a stream."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_a_task_chats_with_a_model_by_its_name(client: LatticeClient, started: Callable[..., Any]) -> None:
    started("tiny")
    status, whole = answer(client, "tiny", "hello big world")
    assert (status, json.loads(whole)["choices"][0]["message"]["content"]) == (200, "hello big world")
    status, streamed = answer(client, "tiny", "hello big world", stream=True)
    found = chunks(streamed)
    assert status == 200
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in found[:-1]) == "hello big world "
    assert found[-1] == "[DONE]"
    status, embedded = answer(client, "tiny", "four", path="embeddings")
    assert (status, json.loads(embedded)["data"][0]["embedding"]) == (200, [4.0])
    assert [service.spec.name for service in client.llm.list()] == ["tiny"]


def test_clients_that_start_a_model_at_once_get_one_instance(
    address: str, client: LatticeClient, started: Callable[..., Any]
) -> None:
    together = Barrier(3)

    def start(_: int) -> service_pb2.Service:
        with LatticeClient(address) as own:
            together.wait(WAIT_S)
            return own.llm.start("tiny", command=COMMAND, cpu=0.1, timeout=WAIT_S)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(start, range(3)))
    assert {one.instance_id for service in found for one in service.instances} == {"tiny-1"}
    assert answer(client, "tiny", "hello")[0] == 200


def test_the_gateway_ends_with_the_last_model(client: LatticeClient, started: Callable[..., Any]) -> None:
    started("tiny")
    assert answer(client, "tiny", "x")[0] == 200
    client.services.stop("tiny", timeout=WAIT_S)
    until(lambda: all(node.free == node.capacity for node in client.nodes()), "the node is free again")
    started("tiny")
    assert answer(client, "tiny", "x")[0] == 200


def test_a_key_is_refused_when_its_attempt_has_ended_and_for_other_models(
    client: LatticeClient, started: Callable[..., Any]
) -> None:
    started("tiny")
    base_url, key, *_ = client.run_task(chat, {"name": "tiny", "text": "x"})["result"]
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    until(lambda: post(base_url, key, "chat/completions", body)[0] == 401, "the key ends")
    assert post(base_url, "lk-guessed", "chat/completions", body)[0] == 401
    status, refusal = answer(client, "tiny", "x", model="other")
    assert (status, json.loads(refusal)["error"]["code"]) == (404, "model_not_found")
    # The key of an attempt stays in the gateway.
    assert json.loads(answer(client, "tiny", "authorization")[1])["choices"][0]["message"]["content"] == "none"


@pytest.mark.parametrize("fault", ["cut", "silent", "abort"])
def test_a_stream_that_is_not_complete_ends_with_an_error(
    client: LatticeClient, started: Callable[..., Any], fault: str
) -> None:
    started("tiny", "--fault", fault)
    status, streamed = answer(client, "tiny", "one two three four", stream=True)
    found = [chunk for chunk in chunks(streamed) if chunk != "[DONE]"]
    assert status == 200
    assert found[0]["choices"][0]["delta"]["content"] == "one "
    assert [chunk["error"]["code"] for chunk in found if "error" in chunk] == ["replica_lost"]
    reasons = [choice["finish_reason"] for chunk in found for choice in chunk.get("choices", ())]
    assert set(reasons) == {None}


def test_another_instance_answers_when_one_is_lost_before_its_first_byte(
    client: LatticeClient, started: Callable[..., Any], room: Room
) -> None:
    started("tiny", replicas=2)
    workflow = client.create_workflow()
    workflow.add_task(chat_twice, {"name": "tiny", "room": room})
    run = workflow.run()
    until(room.notes, "the first answer is there")
    pid = json.loads(answer(client, "tiny", "x")[1])["system_fingerprint"]
    os.kill(int(pid), 9)
    room.open()
    first, second = run.result(timeout=WAIT_S)["result"]
    assert second != pid
    assert first.isdigit()


def test_engine_that_refuses_everything_is_an_error_after_all_its_instances(
    client: LatticeClient, started: Callable[..., Any]
) -> None:
    started("tiny", "--fault", "busy", replicas=2)
    status, refusal = answer(client, "tiny", "x")
    assert (status, json.loads(refusal)["error"]["code"]) == (503, "replica_lost")


def test_an_idle_model_starts_again_for_a_request(
    client: LatticeClient, started: Callable[..., Any], room: Room
) -> None:
    started("tiny", idle_timeout=0.5)
    until(lambda: client.services.get("tiny").state == service_pb2.SERVICE_STATE_IDLE, "it is idle")
    assert answer(client, "tiny", "x")[0] == 200
    # A task that has its address holds it; one whose instance is killed waits for the next.
    workflow = client.create_workflow()
    workflow.add_task(chat_twice, {"name": "tiny", "room": room})
    run = workflow.run()
    until(room.notes, "the first answer is there")
    before = client.services.get("tiny").restarts
    os.kill(int(json.loads(answer(client, "tiny", "x")[1])["system_fingerprint"]), 9)
    until(lambda: client.services.get("tiny").restarts > before, "the loss is noticed")
    room.open()
    first, second = run.result(timeout=WAIT_S)["result"]
    assert first != second


def test_a_provider_gets_its_key_from_the_gateway_and_the_task_has_another(
    client: LatticeClient, started: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROVIDER_KEY", "canary-of-the-provider")
    (instance,) = started("outside").instances
    url = f"http://{instance.endpoint}/v1"
    client.llm.start("gpt", "gpt-x", base_url=url, api_key=secret("PROVIDER_KEY"), timeout=WAIT_S)
    found = client.run_task(chat, {"name": "gpt", "text": "authorization"})["result"]
    assert json.loads(found[3])["choices"][0]["message"]["content"] == "Bearer canary-of-the-provider"
    assert json.loads(found[3])["model"] == "gpt-x"
    assert found[1].startswith("lk-")
    service = client.services.get("gpt")
    assert (service.state, list(service.instances), service.spec.base_url) == (
        service_pb2.SERVICE_STATE_READY,
        [],
        url,
    )
    assert "canary" not in str(service)
    with pytest.raises(InvalidArgumentError, match="base_url"):
        client.llm.start("gpt", base_url="ftp://x", timeout=WAIT_S)


def test_an_engine_that_cannot_start_is_a_typed_error(client: LatticeClient, started: Callable[..., Any]) -> None:
    code = "print('OSError: x is not a local folder and is not a valid model identifier'); raise SystemExit(1)"
    with pytest.raises(ServiceFailedError) as caught:
        started("bad", command=[sys.executable, "-c", code])
    assert caught.value.kind == "model_not_found"
    with pytest.raises(TaskFailedError, match="ServiceFailedError"):
        answer(client, "bad", "x")


def test_start_of_a_model_tells_at_once_that_its_engine_exits(
    client: LatticeClient, started: Callable[..., Any]
) -> None:
    begun = time.monotonic()
    with pytest.raises(ServiceFailedError) as caught:
        started("bad", command=[sys.executable, "-c", "print('no licence'); raise SystemExit(1)"])
    assert time.monotonic() - begun < 5.0
    assert (caught.value.kind, caught.value.last_lines) == ("exited", ("no licence",))


def test_the_command_line_starts_and_stops_a_model(address: str) -> None:
    def lattice(*arguments: str) -> Any:
        return CliRunner(env={"LATTICE_TARGET": address}).invoke(main, ["llm", *arguments])

    command = f"{sys.executable} {SERVER} {{host}} {{port}}"
    found = lattice("start", "--cpu", "0.1", "--command", command, "shell")
    assert (found.exit_code, "Service shell is ready" in found.stdout) == (0, True), found.output
    assert lattice("list").stdout.splitlines()[1].startswith("shell\tready\t1/1")
    assert "shell-1: the model is loaded" in lattice("logs", "shell").stdout
    assert lattice("stop", "shell").stdout == "Service shell is stopped.\n"


@task(cpu=0.1, needs_llm="tiny")
def chat_tiny(text: str) -> list[Any]:
    found = context.llm("tiny")
    return list(post(found.base_url, found.api_key, "completions", {"model": "tiny", "prompt": text}))


def test_task_that_needs_a_model_starts_it_and_waits_for_it(
    client: LatticeClient, started: Callable[..., Any], room: Room
) -> None:
    command = ["sh", "-c", 'until [ -e "$0/open" ]; do sleep 0.02; done; exec "$@"', room, *COMMAND]
    started("tiny", command=command, replicas=0, wait=False)
    assert client.services.get("tiny").state == service_pb2.SERVICE_STATE_IDLE
    workflow = client.create_workflow()
    workflow.add_task(chat_tiny, {"text": "x y"})
    run = workflow.run()
    until(lambda: client.services.get("tiny").wanted == 1, "the model is started by the task")
    reasons = client.explain(run, "chat_tiny").reasons
    assert [task_pb2.WaitKind.Name(one.kind) for one in reasons] == ["WAIT_KIND_SERVICE"]
    assert reasons[0].message.startswith("service 'tiny' is not ready: it is ")
    room.open()
    status, body = run.result(timeout=WAIT_S)["result"]
    assert (status, json.loads(body)["choices"][0]["message"]["content"]) == (200, "x y")


def test_need_of_an_unknown_model_is_refused_and_of_a_failed_model_fails_its_task(
    client: LatticeClient, started: Callable[..., Any]
) -> None:
    with pytest.raises(InvalidArgumentError, match="no service 'tiny'"):
        client.run_task(chat_tiny, {"text": "x"})
    with pytest.raises(ServiceFailedError):
        started("tiny", command=["/no/such/program"])
    with pytest.raises(TaskFailedError, match="cannot start") as caught:
        client.run_task(chat_tiny, {"text": "x"})
    assert caught.value.kind == "SERVICE_FAILED"
