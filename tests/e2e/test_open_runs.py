"""Open runs from the Python client: supersteps, questions, handlers and closing."""

import asyncio
import functools
import threading
from dataclasses import dataclass
from typing import Any

import pytest

from lattice_client import LatticeClient, Question, RunError, TaskFailedError, context, task
from tests.e2e.rooms import WAIT_S


@dataclass
class Quota:
    """A value of a class of this module."""

    number: int


@task
def add(a: int, b: int = 1) -> int:
    return a + b


@task
def fail() -> None:
    raise LookupError("broken")


@task
def ask(value: Any) -> Any:
    return context.ask("double", value)


@task
async def ask_async(value: Any) -> Any:
    return await context.ask_async("double", value)


def double(question: Question) -> Any:
    assert question.name == "double"
    return question.payload * 2


def test_a_superstep_gets_outputs_of_earlier_ones(client: LatticeClient) -> None:
    with client.open_run("steps", labels={"kind": "open"}) as run:
        total = run.add(add, {"a": 0})
        for _ in range(20):
            assert run.output(total) < 100
            total = run.add(add, {"a": total.output})
        assert run.output(total.output) == 21
        assert client.describe_run(run).open
    found = client.describe_run(run)
    assert (found.open, found.display_name, found.task_counts.succeeded) == (False, "steps", 21)


@task
def two() -> list[Quota]:
    return [Quota(1), Quota(2)]


def test_a_map_may_be_added_over_a_task_that_was_sent_or_has_ended(client: LatticeClient) -> None:
    def used(quota: Quota) -> int:
        return quota.number * 10

    with client.open_run() as run:
        quotas = run.add(two)
        assert run.output(quotas) == [Quota(1), Quota(2)]
        tens = run.map(used, quotas.output)
        sums = run.map(functools.partial(add, b=2), tens.output)
        assert run.output(sums) == [12, 22]
        assert run.output(run.map(add, run.add(task(lambda: [])).output)) == []
        failed = run.map(add, run.add(fail).output)
        with pytest.raises(RunError, match="task 'fail' did not succeed"):
            run.output(failed)
        with pytest.raises(TaskFailedError):
            run.output("fail")
    names = {found.task_id: found.display_name for found in client.list_tasks(run)}
    assert (names["items"], names["items-2"]) == ("items of two", "items of <lambda>")


@pytest.mark.parametrize("function", [ask, ask_async])
def test_questions_of_parallel_tasks_are_answered_while_the_caller_waits(client: LatticeClient, function: Any) -> None:
    threads = set()

    def answer(question: Question) -> Any:
        threads.add(threading.get_ident())
        return double(question)

    with client.open_run(on_question=answer) as run:
        asked = [run.add(function, {"value": number}) for number in range(20)]
        assert [run.output(one) for one in asked] == [2 * number for number in range(20)]
        assert run.output(run.add(function, {"value": (1, "x")})) == (1, "x", 1, "x")
    assert threads == {threading.get_ident()}


def test_an_asyncio_caller_answers_questions_side_by_side(client: LatticeClient) -> None:
    async def scenario() -> None:
        at_once = asyncio.Barrier(5)

        async def answer(question: Question) -> Any:
            async with asyncio.timeout(WAIT_S):
                await at_once.wait()
            return double(question)

        async with client.aio.open_run(on_question=answer) as run:
            asked = [await run.add(ask_async, {"value": number}) for number in range(5)]
            assert await asyncio.gather(*map(run.output, asked)) == [0, 2, 4, 6, 8]
            ended = [one async for one in run.as_completed(asked)]
            assert sorted(one.task_id for one in ended) == sorted(one.task_id for one in asked)

    asyncio.run(scenario())


def test_a_handler_that_raises_is_a_typed_error_in_the_task(client: LatticeClient) -> None:
    @task
    def told() -> Any:
        try:
            return context.ask("x")
        except context.AnswerError as error:
            return [error.type, str(error)]

    def refuse(question: Question) -> Any:
        raise KeyError("no such thing")

    with client.open_run(on_question=refuse) as run:
        assert run.output(run.add(told)) == ["KeyError", "KeyError: 'no such thing'"]
        with pytest.raises(TaskFailedError, match="no such thing") as caught:
            run.output(run.add(ask, {"value": 1}))
        assert type(caught.value.__cause__).__name__ == "AnswerError"


def test_questions_are_iterated_over_without_a_handler(client: LatticeClient) -> None:
    with client.open_run() as run:
        asked = [run.add(ask, {"value": number}) for number in (1, 2, 3)]
        seen = []
        for question in run.questions(timeout=WAIT_S):
            assert question.answer(question.payload * 10)
            assert not question.answer("twice")
            seen.append(question.task_id)
            if len(seen) == 3:
                break
        assert [run.output(one) for one in asked] == [10, 20, 30]
        assert sorted(seen) == sorted(one.task_id for one in asked)


def test_a_run_that_is_not_open_cannot_ask(client: LatticeClient) -> None:
    with pytest.raises(TaskFailedError, match="no caller can be asked") as caught:
        client.run_task(ask, {"value": 1})
    assert type(caught.value.__cause__).__name__ == "QuestionError"
