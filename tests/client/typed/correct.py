"""What type checkers and the building of a workflow take as it is."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from lattice_client import (
    AsyncLatticeClient,
    LatticeClient,
    LatticeWorkflow,
    TaskDefinition,
    entrypoint,
    task,
    template,
)


class Split(TypedDict):
    head: str
    tail: list[str]


@dataclass
class Row:
    number: int


@task
def split(text: str) -> Split:
    return {"head": text[:1], "tail": list(text[1:])}


@task(resources={"cpu": 1, "gpu": 1, "cpu_mem": 512}, retries=2, retry_on=[ValueError, "crash"], timeout=30)
def of_all_kinds(
    text: str,
    items: list[str],
    rows: Sequence[Row],
    names: Iterable[str],
    counts: Mapping[str, int],
    mode: Literal["fast", "slow"],
    parts: Split,
    row: Row,
    pair: tuple[int, str],
    path: str | Path,
    share: float = 0.5,
    call: Callable[[], int] | None = None,
) -> int:
    return len(items)


@task
async def later(number: int) -> int:
    await asyncio.sleep(0)
    return number


@task(inputs=["x"], outputs=["y"])
def of_the_seed(params: dict[str, Any]) -> dict[str, Any]:
    return {"y": params["x"]}


@task(batch_size=10, batch_timeout=1.0)
def embed(text: list[str]) -> list[int]:
    return [len(one) for one in text]


def plain(number: int) -> int:
    return number


def build(client: LatticeClient) -> LatticeWorkflow:
    workflow = client.create_workflow("all")
    topic = workflow.parameter("topic", default="tea")
    first = workflow.add_task(split.bind(template("about {topic}", topic=topic)))
    head, tail = first.outputs["head"], first.outputs["tail"]
    workflow.add_task(
        of_all_kinds.bind(
            head,
            items=["a", tail[0]],
            rows=[Row(1), Row(2)],
            names=tail,
            counts={"a": 1},
            mode="fast",
            parts={"head": head, "tail": ["b"]},
            row=Row(number=first.outputs["tail"][1]),
            pair=(1, head),
            path=Path("x"),
            share=1,
        ),
        task_id="all",
        when=head,
        equals="a",
    )
    wired = split.bind(text=topic)
    again = workflow.add_task(wired, task_name="again")
    number = workflow.add_task(later.bind(number=again.outputs["tail"][0]))
    workflow.add_task(of_the_seed.bind({"x": number.output.optional()}))
    workflow.add_task(of_the_seed, {"x": number.output})
    workflow.add_task(embed, {"text": head})
    workflow.map(split, over=tail)
    workflow.map(split, over={"text": tail})
    workflow.add_task(plain, {"number": number.output})
    changed: TaskDefinition[[int], Any] = task(plain).with_(cpu=2, retries=3, timeout=1.5, node_selector={"a": "b"})
    last = workflow.add_task(changed.bind(True))
    workflow.add_task(entrypoint("statistics:mean", inputs=["data"]).with_(priority=1).bind(data=[1, 2]))
    workflow.add_edge(number, last)
    return workflow


def direct() -> tuple[Split, int]:
    return split("ab"), task(cpu=2)(plain)(3)


def run(client: LatticeClient) -> dict[str, Any]:
    found = client.run_task(split.bind("ab"), labels={"a": "b"}, timeout=3)
    return found | build(client).run("id", labels={"a": "b"}, priority=1, parameters={"topic": "a"}).result(timeout=3)


async def run_later(client: AsyncLatticeClient) -> dict[str, Any]:
    return await client.run_task(later.bind(3))
