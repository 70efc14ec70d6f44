"""Answers to a caller about the tasks that it called."""

from types import SimpleNamespace
from typing import Any

import pytest

from lattice_server.core.messages import CallOutputs, TaskAwaits, TaskSucceeded
from lattice_server.core.model import Failure, FailureKind, Isolation, Payload
from lattice_server.core.run.task_table import TaskRecord
from lattice_server.core.states import TaskState
from lattice_server.engine.runs import calls
from tests.server.core.graphs import task

PICKLE = "application/vnd.lattice.cloudpickle"


def entry_of(caller: Isolation, payload: Payload, state: TaskState = TaskState.SUCCEEDED) -> Any:
    called = TaskRecord(task("p/c"), 0, state, outputs={"out": payload}, spawned_by="p", is_called=True)
    records = {"p": TaskRecord(task("p", isolation=caller), 0, TaskState.RUNNING), "p/c": called}
    return SimpleNamespace(run=SimpleNamespace(tasks=records), calls={})


@pytest.mark.parametrize(
    ("caller", "payload", "is_given"),
    [
        (Isolation.NONE, Payload(PICKLE, b"1", Isolation.SECCOMP), False),
        (Isolation.NONE, Payload("application/json", "1", Isolation.SECCOMP), True),
        (Isolation.SECCOMP, Payload(PICKLE, b"1", Isolation.SECCOMP), True),
        (Isolation.NONE, Payload(PICKLE, b"1"), True),
    ],
)
def test_a_caller_is_not_given_a_pickle_of_a_task_that_is_isolated_more_strictly(
    caller: Isolation, payload: Payload, is_given: bool
) -> None:
    entry = entry_of(caller, payload)
    (told,) = calls.begin(entry, TaskAwaits("r", "p", 1, "lease", 1, "p/c"))
    if is_given:
        assert told.result == CallOutputs({"out": payload})
    else:
        assert isinstance(told.result, Failure)
        assert told.result.kind is FailureKind.UNTRUSTED_INPUT
    waiting = entry_of(caller, payload, TaskState.RUNNING)
    assert calls.begin(waiting, TaskAwaits("r", "p", 1, "lease", 1, "p/c")) == []
    waiting.run.tasks["p/c"].state = TaskState.SUCCEEDED
    assert calls.ended(waiting, TaskSucceeded("r", "p/c", 1, {"out": payload})) == [told]
    assert calls.ended(waiting, TaskSucceeded("r", "p/c", 1, {"out": payload})) == []


@pytest.mark.parametrize(("caller", "called"), [("other", "p/c"), ("p", "p"), ("p", "ghost")])
def test_a_task_waits_only_for_tasks_that_it_called(caller: str, called: str) -> None:
    entry = entry_of(Isolation.NONE, Payload("application/json", "1"))
    (told,) = calls.begin(entry, TaskAwaits("r", caller, 1, "lease", 1, called))
    assert told.result == f"this task did not call {called!r}"
