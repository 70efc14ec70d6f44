"""Servers on one journal, one after the other: runs and workflows after a restart. None of the servers has workers."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from lattice.v1 import payload_pb2, resources_pb2, results_pb2, run_pb2, task_pb2, workflow_pb2

from tests.server.apps import NoWorkers, serving_aside
from tests.server.rpc.callers import Caller, calling, graph, output, refused, task


@contextmanager
def started(folder: Path) -> Iterator[Caller]:
    """Call a server on the journal in a folder while the block runs."""
    with serving_aside(NoWorkers(), journal=str(folder), stop_grace_s=0.1) as address, calling(address) as caller:
        yield caller


def run(caller: Caller, run_id: str) -> workflow_pb2.RunWorkflowResponse:
    chain = graph(task("a"), task("b", inputs={"x": output("a")}))
    return caller.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(run_id=run_id, workflow=chain))


def get(caller: Caller, run_id: str) -> run_pb2.Run:
    return caller.workflows.GetRun(workflow_pb2.GetRunRequest(run_id=run_id, view=run_pb2.VIEW_FULL)).run


def cancel(caller: Caller, run_id: str) -> None:
    caller.workflows.CancelRun(workflow_pb2.CancelRunRequest(run_id=run_id))
    request = results_pb2.WatchRunRequest(run_id=run_id)
    *_, last = caller.results.WatchRun(request)
    assert last.complete


def listed(caller: Caller, size: int, **settings: Any) -> list[str]:
    """Return the ids of all runs, in pages of a size."""
    found: list[str] = []
    token = ""
    while True:
        request = workflow_pb2.ListRunsRequest(page_size=size, page_token=token, **settings)
        page = caller.workflows.ListRuns(request)
        assert len(page.runs) <= size
        found += [shown.run_id for shown in page.runs]
        token = page.next_page_token
        if not token:
            return found


def test_a_run_waits_as_before_when_the_server_was_restarted(tmp_path: Path) -> None:
    with started(tmp_path) as caller:
        before = run(caller, "r").run
        assert before.task_counts.queued == 1
    with started(tmp_path) as caller:
        assert get(caller, "r") == before
        tasks = caller.tasks.ListTasks(task_pb2.ListTasksRequest(run_id="r")).tasks
        assert [(found.task_id, found.state) for found in tasks] == [
            ("a", run_pb2.TASK_STATE_QUEUED),
            ("b", run_pb2.TASK_STATE_BLOCKED),
        ]
        again = run(caller, "r")
        assert (again.created, again.run) == (False, before)
        cancel(caller, "r")
    with started(tmp_path) as caller:
        assert get(caller, "r").state == run_pb2.RUN_STATE_CANCELLED
        again = run(caller, "r")
        assert (again.created, again.run.state) == (False, run_pb2.RUN_STATE_CANCELLED)
        with refused(grpc.StatusCode.ALREADY_EXISTS, "RUN_ID_CONFLICT"):
            caller.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(run_id="r", workflow=graph(task("other"))))
        with refused(grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND"):
            get(caller, "unknown")


def test_runs_of_equal_workflows_are_apart_after_a_restart(tmp_path: Path) -> None:
    with started(tmp_path) as caller:
        before = {run_id: run(caller, run_id).run for run_id in ("r0", "r1", "r2")}
    with started(tmp_path) as caller:
        cancel(caller, "r1")
        assert [get(caller, run_id) for run_id in ("r0", "r2")] == [before["r0"], before["r2"]]
        assert get(caller, "r1").state == run_pb2.RUN_STATE_CANCELLED


def test_runs_are_listed_once_newest_first_when_some_are_only_in_the_journal(tmp_path: Path) -> None:
    with started(tmp_path) as caller:
        for number in range(5):
            run(caller, f"r{number}")
        for number in (0, 2, 3):
            cancel(caller, f"r{number}")
    with started(tmp_path) as caller:
        run(caller, "r5")
        newest_first = ["r5", "r4", "r3", "r2", "r1", "r0"]
        assert [listed(caller, size) for size in (1, 2, 5, 6, 100)] == [newest_first] * 5
        get(caller, "r2")
        assert listed(caller, 2) == newest_first, "a run that was read again keeps its place"
        assert listed(caller, 1, states=[run_pb2.RUN_STATE_CANCELLED]) == ["r3", "r2", "r0"]
        assert listed(caller, 2, labels={"no": "label"}) == []


def test_a_stored_workflow_and_its_changes_are_there_when_the_server_was_restarted(tmp_path: Path) -> None:
    with started(tmp_path) as caller:
        for named in ("kept", "deleted"):
            request = workflow_pb2.CreateWorkflowRequest(workflow_id=named, spec=graph(task("a"), task("b")))
            caller.workflows.CreateWorkflow(request)
        edge = workflow_pb2.Edge(source_task_id="a", target_task_id="b")
        caller.workflows.AddEdges(workflow_pb2.AddEdgesRequest(workflow_id="kept", edges=[edge]))
        caller.workflows.DeleteWorkflow(workflow_pb2.DeleteWorkflowRequest(workflow_id="deleted"))
        before = caller.workflows.GetWorkflow(workflow_pb2.GetWorkflowRequest(workflow_id="kept"))
    with started(tmp_path) as caller:
        assert caller.workflows.GetWorkflow(workflow_pb2.GetWorkflowRequest(workflow_id="kept")) == before
        with refused(grpc.StatusCode.NOT_FOUND, "WORKFLOW_NOT_FOUND"):
            caller.workflows.GetWorkflow(workflow_pb2.GetWorkflowRequest(workflow_id="deleted"))
        made = caller.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(workflow_id="kept")).run
        assert (made.task_counts.queued, made.task_counts.blocked) == (1, 1)


@pytest.mark.parametrize("is_ended", [False, True])
def test_damaged_records_fail_only_calls_that_name_their_run(tmp_path: Path, is_ended: bool) -> None:
    with started(tmp_path) as caller:
        for named in ("damaged", "whole"):
            run(caller, named)
            if is_ended:
                cancel(caller, named)
    database = sqlite3.connect(tmp_path / "journal.sqlite")
    database.execute("UPDATE definitions SET cell = x'00' WHERE run = 1")
    database.commit()
    database.close()
    for _ in range(2):
        with started(tmp_path) as caller:
            with refused(grpc.StatusCode.FAILED_PRECONDITION, "JOURNAL_CORRUPT"):
                get(caller, "damaged")
            assert get(caller, "whole").run_id == "whole"


def delete(caller: Caller, run_id: str) -> None:
    caller.workflows.DeleteRun(workflow_pb2.DeleteRunRequest(run_id=run_id))


@pytest.mark.parametrize("is_damaged", [False, True])
def test_an_ended_run_is_deleted_without_being_read(tmp_path: Path, is_damaged: bool) -> None:
    with started(tmp_path) as caller:
        run(caller, "r")
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "RUN_NOT_ENDED"):
            delete(caller, "r")
        run(caller, "kept")
        cancel(caller, "kept")
        cancel(caller, "r")
        run(caller, "in memory")
        cancel(caller, "in memory")
        delete(caller, "in memory")
        with refused(grpc.StatusCode.NOT_FOUND, "RUN_EVICTED"):
            get(caller, "in memory")
    if is_damaged:
        with sqlite3.connect(tmp_path / "journal.sqlite") as database:
            database.execute("UPDATE definitions SET cell = x'00' WHERE run = 1")
        database.close()
    with started(tmp_path) as caller:
        delete(caller, "r")
        with pytest.raises(grpc.RpcError) as again:
            delete(caller, "r")
        assert again.value.code() is grpc.StatusCode.NOT_FOUND
        assert listed(caller, 10) == ["kept"]
    with started(tmp_path) as caller:
        assert listed(caller, 10) == ["kept"]
        with refused(grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND"):
            get(caller, "r")


def test_signals_survive_a_restart_and_a_repeated_one_counts_once(tmp_path: Path) -> None:
    def send(caller: Caller, name: str, request_id: str, text: str = "1") -> int:
        request = workflow_pb2.SignalRunRequest(run_id="r", name=name, request_id=request_id)
        request.value.json = text
        return caller.workflows.SignalRun(request).index

    with started(tmp_path) as caller:
        run(caller, "r")
        assert [send(caller, "s", "one"), send(caller, "s", "two"), send(caller, "t", "three")] == [0, 1, 0]
    with started(tmp_path) as caller:
        assert [send(caller, "s", "two"), send(caller, "s", "four")] == [1, 2]
        with refused(grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_CONFLICT"):
            send(caller, "s", "two", "2")
        cancel(caller, "r")
        events = [e for m in caller.results.WatchRun(results_pb2.WatchRunRequest(run_id="r")) for e in m.events]
        found = [(e.signal_received.name, e.signal_received.index) for e in events if e.HasField("signal_received")]
        assert found == [("s", 0), ("s", 1), ("t", 0), ("s", 2)]
        assert list(events[-1].run_finished.unread_signals) == ["s", "t"]
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "RUN_ENDED"):
            send(caller, "s", "five")


def test_a_run_is_tied_to_its_caller_after_a_restart_too(tmp_path: Path) -> None:
    def start(caller: Caller, run_id: str, grace_s: float) -> run_pb2.Run:
        request = workflow_pb2.RunWorkflowRequest(run_id=run_id, workflow=graph(task("a")))
        request.cancel_on_disconnect.FromNanoseconds(int(grace_s * 1e9))
        return caller.workflows.RunWorkflow(request).run

    with started(tmp_path) as caller:
        kept = start(caller, "kept", 600.0)
        assert kept.cancel_on_disconnect.seconds == 600
        start(caller, "left", 0.5)
        with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
            start(caller, "wrong", 0.0)
        assert list(refusal.violations) == ["cancel_on_disconnect"]
    with started(tmp_path) as caller:
        *_, last = caller.results.WatchRun(results_pb2.WatchRunRequest(run_id="left"))
        assert last.events[-1].run_finished.failure.message == "its caller was disconnected for 0.5 s"
        assert get(caller, "kept") == kept


def test_a_signal_is_refused_by_field(tmp_path: Path) -> None:
    with started(tmp_path) as caller:
        run(caller, "r")
        value = payload_pb2.Payload(json="1")
        pickled = payload_pb2.Payload(media_type="x", data=b"1", produced_at=resources_pb2.ISOLATION_SECCOMP)
        large = payload_pb2.Payload(media_type="x", data=bytes(2 << 20))
        cases: list[tuple[str, payload_pb2.Payload | None, str]] = [
            ("", value, "name"),
            ("x" * 129, value, "name"),
            ("s", None, "value"),
            ("s", pickled, "value"),
            ("s", large, "value"),
        ]
        for name, payload, field in cases:
            request = workflow_pb2.SignalRunRequest(run_id="r", name=name, value=payload)
            with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
                caller.workflows.SignalRun(request)
            assert list(refusal.violations) == [field]
        with refused(grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND"):
            caller.workflows.SignalRun(workflow_pb2.SignalRunRequest(run_id="other", name="s", value=value))
