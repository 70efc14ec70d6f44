"""Graphs that are larger than a message: the client sends them in parts, with the same result."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lattice_client import AsyncLatticeClient, LatticeClient, TaskDefinitionError, errors, task
from lattice_client.runs import parts
from lattice_server import config
from tests.server.apps import serving_aside

MOST_BYTES, MOST_TASKS = 1024 * 1024, 1000
pytestmark = pytest.mark.slow


@task
def one(x: int = 0) -> int:
    return x + 1


@task
def total(values: list[int]) -> int:
    return sum(values)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server that takes small messages only."""
    with serving_aside(message_limit_bytes=MOST_BYTES, message_limit_tasks=MOST_TASKS) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[LatticeClient]:
    """A client of it."""
    with LatticeClient(address) as found:
        yield found


def fill(workflow: Any, width: int = 1100) -> None:
    """Add a task, `width` behind it, a chain, and a task that gathers all: more than one message carries."""
    first = workflow.add_task(one, {"x": 1})
    found = [workflow.add_task(one, {"x": first.output}).output for _ in range(width)]
    for _ in range(50):
        found.append(workflow.add_task(one, {"x": found[-1]}).output)
    workflow.add_task(total, {"values": found})


# 2, then 1100 times 3, then 4 to 53.
FILLED = 1100 * 3 + sum(range(4, 54))


def test_a_graph_of_too_many_tasks_is_run(client: LatticeClient) -> None:
    workflow = client.create_workflow("wide")
    fill(workflow)
    run = workflow.run("large-run")
    assert run.result() == {"result": FILLED}
    assert client.describe_run(run).display_name == "wide"
    again = client.create_workflow("wide")
    fill(again)
    assert again.run("large-run") == run, "the same id and content is the same run"
    other = client.create_workflow("wide")
    fill(other, width=1099)
    with pytest.raises(errors.AlreadyExistsError):
        other.run("large-run")


async def _run(address: str) -> dict[str, Any]:
    async with AsyncLatticeClient(address) as found:
        workflow = found.create_workflow()
        fill(workflow)
        return await (await workflow.run()).result()


def test_the_asyncio_client_sends_parts_as_well(address: str) -> None:
    assert asyncio.run(_run(address)) == {"result": FILLED}


def test_inputs_that_are_too_many_bytes_together_are_sent(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    lengths = [workflow.add_task(length, {"text": "x" * 4000}).output for _ in range(600)]
    workflow.add_task(total, {"values": lengths})
    assert workflow.run().result() == {"result": 600 * 4000}


@task
def length(text: str) -> int:
    return len(text)


def closure(size: int, mark: str) -> Any:
    """Return a function that brings `size` bytes along."""
    data = mark * size

    def measured() -> int:
        return len(data)

    return task(measured)


def test_code_that_is_too_many_bytes_together_is_sent(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    found = [workflow.add_task(closure(400_000, mark)).output for mark in "abcdef"]
    workflow.add_task(total, {"values": found})
    assert workflow.run().result() == {"result": 6 * 400_000}


def test_code_is_sent_again_in_parts_when_the_server_lacks_it(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    functions = [closure(400_000, mark) for mark in "uvwxyz"]
    for function in functions:
        workflow.add_task(function)
    for function in functions:
        function.pack()
    client.twin.api.starter._sender.known_code.note_sent(function.packed[0] for function in functions)
    assert set(workflow.run().result()) == set(workflow.tasks)


def test_error_names_the_function_when_it_exceeds_a_message(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    workflow.add_task(closure(2 * MOST_BYTES, "x"))
    with pytest.raises(TaskDefinitionError, match=r"'measured'.*has \d+ bytes.*1048576.*as inputs") as caught:
        workflow.run()
    with pytest.raises(TaskDefinitionError) as alone:
        client.run_task(closure(2 * MOST_BYTES, "x"))
    assert str(alone.value) == str(caught.value)


def test_error_names_the_task_when_its_inputs_exceed_a_message(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    workflow.add_task(total, {"values": [1]}, task_id="small")
    workflow.add_task(keywords, {f"x{number}": "x" * 4000 for number in range(300)}, task_id="big")
    with pytest.raises(TaskDefinitionError, match=r"task 'big' has \d+ bytes.*uploaded"):
        workflow.run()


@task
def keywords(**inputs: str) -> int:
    return len(inputs)


def test_a_single_task_brings_its_code_in_parts(client: LatticeClient) -> None:
    assert client.run_task(closure(MOST_BYTES - 60_000, "y")) == {"result": MOST_BYTES - 60_000}


def test_a_large_workflow_is_stored(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    fill(workflow)
    stored = workflow.store("large-workflow")
    assert stored.run().result() == {"result": FILLED}
    again = client.create_workflow()
    fill(again)
    assert again.store("large-workflow").workflow_id == "large-workflow"


def test_many_tasks_are_added_to_a_run(client: LatticeClient, gate: Path) -> None:
    workflow = client.create_workflow()
    first = workflow.add_task(held, {"gate": str(gate)}, task_id="first")
    run = workflow.run()
    more = client.create_workflow()
    found = [more.add_task(one, {"x": first.output}).output for _ in range(1200)]
    more.add_task(total, {"values": found}, task_id="sum")
    assert run.add_tasks(list(more.tasks.values())) == 2
    gate.write_text("open")
    assert run.output("sum") == 1200 * 2


@task
def held(gate: str) -> int:
    Path(gate).read_text()
    return 1


def test_wrong_graph_is_refused_alike_when_it_is_sent_in_parts(client: LatticeClient) -> None:
    texts = []
    for width in (3, 2000):
        workflow = client.create_workflow()
        first, second = workflow.add_task(one, task_id="a"), workflow.add_task(one, task_id="b")
        workflow.add_edge(first, second)
        workflow.add_edge(second, first)
        for _ in range(width):
            workflow.add_task(one)
        with pytest.raises(errors.InvalidArgumentError) as caught:
            workflow.run()
        texts.append((str(caught.value), caught.value.reason))
    assert texts[0] == texts[1]
    assert texts[0][1] == "WORKFLOW_CYCLE"


def test_limits_are_not_read_when_a_graph_is_small() -> None:
    assert (parts.ALWAYS_BYTES, parts.ALWAYS_TASKS) == (config.MIN_MESSAGE_BYTES, config.MIN_MESSAGE_TASKS)
    assert config.ServerConfig().message_limit_bytes >= parts.ALWAYS_BYTES
