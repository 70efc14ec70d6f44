"""Records of the journal decode to the values that were encoded."""

from dataclasses import replace
from random import Random

import pytest
from lattice.v1 import task_pb2

from lattice_server.core.messages import (
    Fact,
    NetworkAccess,
    NetworkVerdict,
    RunCancelling,
    RunEvent,
    RunFinished,
    RunStarted,
    SignalAwaited,
    SignalReceived,
    SignalTaken,
    TaskAccessedNetwork,
    TaskCancelled,
    TaskFailed,
    TaskLogged,
    TaskRetrying,
    TasksAdded,
    TaskSkipped,
    TaskStarted,
    TaskSucceeded,
)
from lattice_server.core.model import (
    Artifact,
    Failure,
    FailureKind,
    Function,
    Isolation,
    Payload,
    TaskSpec,
    WorkflowSpec,
)
from lattice_server.core.run import dag
from lattice_server.core.run.run import Run
from lattice_server.core.states import RunState
from lattice_server.core.steps import finish
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.stores.code_store import CodeStore
from lattice_server.rpc.convert.functions import bundle_from_proto, function_from_proto
from lattice_server.rpc.convert.journal import ContractCodec
from lattice_server.rpc.convert.recorded_events import FACTS
from tests.server.core.worlds import random_workflow

BUNDLE = bundle_from_proto(task_pb2.CodeBundle(digest="sha256:b", zip=b"zip"))
CODE = task_pb2.Function(
    python=task_pb2.PythonFunction(pickle=b"code", concurrency=task_pb2.CONCURRENCY_ASYNC), bundle_digest="sha256:b"
)
FUNCTION = function_from_proto(CODE, lambda digest: BUNDLE)
KEY = "r\ntenant"
CAUSE = Failure(FailureKind.TIMEOUT, "late", task_id="b")
FAILURE = Failure(
    FailureKind.USER_ERROR,
    "broken",
    type="ValueError",
    traceback="Traceback",
    exception=Payload("application/x", b"e"),
    task_id="a",
    exit_status=3,
    cause=CAUSE,
    base_types=("Exception",),
)
VALUE = Payload("application/json", "[1,2]")
LARGE = Payload("application/x", Artifact("f" * 64, 9, "n"), Isolation.SECCOMP)
ITEMS = (Payload("application/json", "1"), Payload("application/x", b""))
KINDS: list[Fact] = [
    RunStarted("w", 3),
    RunCancelling(FAILURE),
    RunFinished(RunState.SUCCEEDED, None),
    RunFinished(RunState.FAILED, FAILURE, ("approval", "other")),
    TasksAdded(("a", "b"), "a", 4),
    TaskStarted(KEY, "a", 2, "n", "10.0.0.1", (0, 1), None, "e-7", 5),
    TaskSucceeded(KEY, "a", 2, {"x": VALUE, "y": LARGE}, {"x": ITEMS}, 0.25),
    TaskRetrying(KEY, "a", 1, FAILURE, 1.5),
    TaskFailed(KEY, "a", 1, FAILURE),
    TaskCancelled(KEY, "a", 0, CAUSE),
    TaskSkipped(KEY, "a", None),
    TaskSkipped(KEY, "a", FAILURE),
    TaskLogged(KEY, "a", 1, True, "text\n", True),
    SignalReceived("approval", 1, ITEMS[1], "request"),
    SignalAwaited(KEY, "a", 2, "approval"),
    SignalTaken(KEY, "a", 2, "approval", 1),
    *(
        TaskAccessedNetwork(KEY, "a", 1, NetworkAccess("a.b", 443, verdict, "why", "1.2.3.4", 5, 6, 7, is_final))
        for verdict in NetworkVerdict
        for is_final in (False, True)
    ),
]


@pytest.fixture
def entry() -> RunEntry:
    spec = WorkflowSpec(tuple(TaskSpec(name, FUNCTION, name, outputs=("x", "y")) for name in "ab"))
    return RunEntry(Run(KEY, spec, dag.build(spec)), 1, "", 0.0, {})


@pytest.mark.parametrize("fact", KINDS, ids=lambda fact: type(fact).__name__)
def test_event_reads_back_as_it_was(fact: Fact, entry: RunEntry) -> None:
    codec = ContractCodec(CodeStore())
    event = RunEvent(7, 1_700_000_000.25, fact)
    entry.start_times_s["a"], entry.end_times_s["a"] = 1_700_000_000.0, 1_700_000_000.125
    found = codec.read_event(KEY, *codec.event(entry, event))
    assert (found.event.sequence, found.event.time_s) == (7, pytest.approx(event.time_s))
    read = found.event.fact
    if isinstance(read, TaskRetrying) and isinstance(fact, TaskRetrying):
        assert read.delay_s == pytest.approx(fact.delay_s, abs=1e-6)
        read = replace(read, delay_s=fact.delay_s)
    assert read == fact
    happened = {TaskStarted: 1_700_000_000.0, TaskSucceeded: 1_700_000_000.125, TaskFailed: 1_700_000_000.125}
    assert found.happened_s == pytest.approx(happened.get(type(fact), event.time_s))
    if isinstance(fact, TaskStarted):
        assert (found.lease_id, found.item) == ("e-7", 5)


def test_tasks_that_a_task_called_read_back_as_called(entry: RunEntry) -> None:
    codec = ContractCodec(CodeStore())
    event = RunEvent(1, 0.0, TasksAdded(("b",), "a", 2))
    assert not codec.read_event(KEY, *codec.event(entry, event)).is_called
    entry.run.tasks["b"].is_called = True
    assert codec.read_event(KEY, *codec.event(entry, event)).is_called


def test_servers_of_a_sandbox_read_back_as_they_were() -> None:
    task = TaskSpec("a", FUNCTION, "a", isolation=Isolation.SECCOMP, network=("a.b:443", "*.c:80"))
    codec = ContractCodec(CodeStore())
    code = {item.digest: item.encode() for item in codec.code([FUNCTION])}
    found = finish(codec.read_workflow(finish(codec.workflow(WorkflowSpec((task,)))), code.__getitem__))
    assert found.tasks[0].network == ("a.b:443", "*.c:80")


def test_all_kinds_of_events_are_read() -> None:
    assert len({type(fact) for fact in KINDS}) == len(FACTS)


@pytest.mark.parametrize("seed", range(30))
def test_workflow_and_its_code_read_back_as_they_were(seed: int) -> None:
    made = random_workflow(Random(seed), 12)
    tasks = tuple(replace(spec, function=FUNCTION, display_name=f"name of {spec.task_id}") for spec in made.tasks)
    spec = replace(made, tasks=tasks, display_name="flow", parameters={"p": VALUE})
    codec = ContractCodec(CodeStore())
    code = {item.digest: item.encode() for item in codec.code([FUNCTION])}
    found = finish(codec.read_workflow(finish(codec.workflow(spec)), code.__getitem__))
    assert [as_read(task) for task in found.tasks] == [as_read(task) for task in tasks]
    assert replace(found, tasks=()) == replace(spec, tasks=())
    for task in found.tasks:
        assert task.function.definition == FUNCTION.definition
        assert task.function.bundle is not None
        assert task.function.bundle.content == BUNDLE.content


def as_read(task: TaskSpec) -> TaskSpec:
    """Return a task whose function is compared by what decides how it is run."""
    function = task.function
    plain = Function(function.digest, function.is_async, None, None, function.entrypoint, function.runtime)
    return replace(task, function=plain)


def test_code_that_the_server_has_is_not_made_again() -> None:
    store = CodeStore()
    kept = store.put(FUNCTION)
    spec = WorkflowSpec((TaskSpec("a", FUNCTION, "a"),))
    codec = ContractCodec(store)
    found = finish(codec.read_workflow(finish(codec.workflow(spec)), {}.__getitem__))
    assert found.tasks[0].function is kept
