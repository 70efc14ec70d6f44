"""Signals: tasks that wait for a value that is sent to their run from outside."""

import asyncio
import json
import subprocess
from typing import Any

import pytest

from lattice_client import InvalidArgumentError, LatticeClient, PreconditionError, Run, TaskDefinitionError, task
from tests.commands import LATTICE

WAIT_S = 60.0


def until_awaited(run: Run, *names: str) -> None:
    """Wait until tasks wait for these signals."""
    left = set(names)
    for event in run.events(timeout=WAIT_S):
        if event.type == "signal_awaited":
            left.discard(event.data["name"])
        if not left:
            return


@pytest.mark.parametrize("level", ["none", "subprocess", "seccomp"])
def test_a_task_waits_for_signals_at_every_level(local: str, level: str) -> None:
    @task(isolation=level)
    def asks() -> Any:
        from lattice_worker import context

        return context.wait_for("approval"), context.wait_for("approval")

    with LatticeClient(local) as client:
        workflow = client.create_workflow()
        workflow.add_task(asks)
        run = workflow.run()
        run.signal("approval", {"ok": True, "by": "Ada"})
        until_awaited(run, "approval")
        run.signal("approval", b"bytes")
        assert run.result(timeout=WAIT_S) == {"result": ({"ok": True, "by": "Ada"}, b"bytes")}


def test_waiting_tasks_hold_no_cpu_and_name_their_signals(local: str) -> None:
    @task(cpu=4)
    def asks(name: str) -> Any:
        from lattice_worker import context

        return context.wait_for(name)

    with LatticeClient(local) as client:
        workflow = client.create_workflow()
        for name in "abc":
            workflow.add_task(asks, {"name": name}, task_id=name)
        run = workflow.run()
        until_awaited(run, *"abc")  # Each of them needs all CPUs of the cluster.
        assert client.describe_run(run).awaited_signals == ["a", "b", "c"]
        (reason,) = run.explain("b").reasons
        assert reason.message.endswith("waits for signal 'b'")
        listed = subprocess.run([LATTICE, "runs", "list", "--addr", local], capture_output=True, text=True, check=True)
        assert "running, waits for signal a b c" in next(line for line in listed.stdout.splitlines() if run in line)
        for name in "abc":
            command = [LATTICE, "runs", "signal", "--addr", local, run, name, json.dumps([name])]
            said = subprocess.run(command, capture_output=True, text=True, check=True)
            assert said.stdout == f"Run {run} has got signal {name}.\n"
        assert run.result(timeout=WAIT_S) == {name: {"result": [name]} for name in "abc"}
        wrong = subprocess.run([*command[:-1], "yes"], capture_output=True, text=True, check=False)
        assert wrong.returncode == 2
        assert "'yes' is not JSON" in wrong.stderr


def test_a_coroutine_that_gives_up_a_wait_misses_no_signal(local: str) -> None:
    @task
    async def asks() -> Any:
        from lattice_worker import context

        for _ in range(2):
            try:
                await asyncio.wait_for(context.wait_for_async("message"), 0.01)
            except TimeoutError:
                continue
        try:
            await context.wait_for_async("message", timeout=0.01)
        except TimeoutError as error:
            late = str(error)
        await context.wait_for_async("go")
        both = await asyncio.gather(context.wait_for_async("message"), context.wait_for_async("message", 60))
        return late, both

    with LatticeClient(local) as client:
        workflow = client.create_workflow()
        workflow.add_task(asks)
        run = workflow.run()
        until_awaited(run, "go")
        run.signal("message", 1)
        run.signal("message", 2)
        run.signal("go")
        assert run.result(timeout=WAIT_S) == {"result": ("signal 'message' was not sent in time", [1, 2])}


def test_wait_times_out_and_repeated_attempt_gets_the_same_values(local: str) -> None:
    @task(retries=1, retry_backoff=0)
    def asks() -> Any:
        from lattice_worker import context

        found = context.wait_for("sent")
        try:
            context.wait_for("never", timeout=0.01)
        except TimeoutError:
            found = [found, context.current().number]
        if context.current().number == 1:
            raise ValueError("again")
        return found

    with LatticeClient(local) as client:
        workflow = client.create_workflow()
        workflow.add_task(asks)
        run = workflow.run()
        run.signal("sent", "once")
        run.signal("unread")
        assert run.result(timeout=WAIT_S) == {"result": ["once", 2]}
        *_, end = run.events()
        assert end.data["unread_signals"] == ["unread"]
        (sent, *_) = [event for event in run.events() if event.type == "signal_received"]
        assert sent.data == {"name": "sent", "index": 0, "value": "once", "request_id": sent.data["request_id"]}
        with pytest.raises(PreconditionError, match="no task of it waits for a signal"):
            run.signal("late")


def test_signals_that_cannot_be_sent_or_awaited_are_refused(local: str) -> None:
    @task
    def asks() -> Any:
        from lattice_worker import context

        found = []
        for name, timeout in (("", None), (1, None), ("x" * 129, None), ("s", -1), ("s", "1"), ("s", float("nan"))):
            try:
                context.wait_for(name, timeout)
            except context.QuestionError as error:
                found.append(str(error).split(" must")[0])
        return found

    with LatticeClient(local) as client:
        workflow = client.create_workflow()
        workflow.add_task(asks)
        run = workflow.run()
        assert run.result(timeout=WAIT_S) == {"result": ["the name of a signal"] * 3 + ["timeout"] * 3}
        with pytest.raises(InvalidArgumentError, match="1 to 128 characters"):
            run.signal("")
        with pytest.raises(TaskDefinitionError, match="has 2000030 bytes, and the limit is"):
            run.signal("s", b"x" * 2_000_000)
        with pytest.raises(TaskDefinitionError, match="cannot be pickled"):
            run.signal("s", (number for number in range(3)))
