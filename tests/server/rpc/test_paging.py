"""Pages: a row that exists all the time is on exactly one page, while other rows are added and removed."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lattice.v1 import cluster_pb2, run_pb2, task_pb2, workflow_pb2

from lattice_server.rpc.paging import MAX_PAGE, number_after, page
from tests.server.apps import NoWorkers, serving_aside
from tests.server.rpc.callers import Caller, calling, ended, fresh, function, graph, run, task


class Listing:
    """Numbered rows, newest first, as runs are."""

    def __init__(self, count: int) -> None:
        self.rows = list(range(1, count + 1))
        self.newest = count

    def change(self, inserted: int, deleted: list[int]) -> None:
        """Insert rows, and delete some by their number."""
        for _ in range(inserted):
            self.newest += 1
            self.rows.append(self.newest)
        self.rows = [row for row in self.rows if row not in deleted]

    def pages(self, size: int, changes: list[tuple[int, list[int]]]) -> list[list[int]]:
        """Return the numbers on all pages, changing the list after each as long as there are changes."""
        request, found = workflow_pb2.ListRunsRequest(page_size=size), []
        while True:
            after = number_after(request)
            rows = ((row, row) for row in reversed(self.rows) if after is None or row < after)
            shown, request.page_token = page(request, rows, lambda row: run_pb2.Run(sequence=row))
            found.append([message.sequence for message in shown])
            if not request.page_token:
                return found
            if changes:
                self.change(*changes.pop())


changes = st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(1, 30), max_size=3)), max_size=10)


@settings(deadline=None)
@given(count=st.integers(0, 30), size=st.integers(1, 8), changes=changes)
def test_each_row_is_seen_once_when_rows_come_and_go_between_pages(
    count: int, size: int, changes: list[tuple[int, list[int]]]
) -> None:
    listing = Listing(count)
    before = set(listing.rows)
    seen = [row for found in listing.pages(size, changes) for row in found]
    assert seen == sorted(set(seen), reverse=True)
    assert set(seen) >= before & set(listing.rows)


def test_page_reads_at_most_one_row_more_than_it_shows() -> None:
    taken = []

    def rows() -> Any:
        for row in range(1000):
            taken.append(row)
            yield row, row

    page(workflow_pb2.ListRunsRequest(page_size=3), rows(), lambda row: run_pb2.Run(sequence=row))
    assert taken == [0, 1, 2, 3]


def test_a_page_has_the_most_rows_when_more_are_wanted() -> None:
    rows = ((row, row) for row in range(2 * MAX_PAGE))
    shown, token = page(workflow_pb2.ListRunsRequest(page_size=10**9), rows, lambda row: run_pb2.Run(sequence=row))
    assert (len(shown), token) == (MAX_PAGE, str(MAX_PAGE - 1))


def test_runs_are_listed_once_when_others_start_between_pages(idle: Caller) -> None:
    labels = {"mark": fresh()}
    ids = [run(idle, labels=labels).run.run_id for _ in range(5)]
    request, seen = workflow_pb2.ListRunsRequest(labels=labels, page_size=2), []
    while True:
        response = idle.workflows.ListRuns(request)
        seen += [found.run_id for found in response.runs]
        request.page_token = response.next_page_token
        if not request.page_token:
            break
        run(idle, labels=labels)
    assert seen == ids[::-1]


def test_tasks_are_listed_once_when_their_states_change_between_pages(idle: Caller) -> None:
    names = [f"t{number}" for number in range(4)]
    policy = workflow_pb2.FAILURE_POLICY_FINISH_INDEPENDENT
    spec = graph(*map(task, names), failure_policy=policy)
    run_id = idle.workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(workflow=spec)).run.run_id
    queued = [run_pb2.TASK_STATE_QUEUED]
    request = task_pb2.ListTasksRequest(run_id=run_id, states=queued, page_size=2)
    first = idle.tasks.ListTasks(request)
    idle.tasks.CancelTask(task_pb2.CancelTaskRequest(run_id=run_id, task_id=names[0]))
    request.page_token = first.next_page_token
    assert [found.task_id for found in first.tasks] == names[:2]
    second = idle.tasks.ListTasks(request)
    assert [found.task_id for found in second.tasks] == names[2:]
    assert not second.next_page_token


def test_nodes_are_listed_by_id_page_by_page(busy: Caller) -> None:
    ended(busy)
    (node,) = busy.cluster.ListNodes(cluster_pb2.ListNodesRequest(page_size=1)).nodes
    after = cluster_pb2.ListNodesRequest(page_token=node.node_id)
    assert not busy.cluster.ListNodes(after).nodes


@pytest.mark.parametrize(("view", "is_whole"), [(run_pb2.VIEW_BASIC, False), (run_pb2.VIEW_FULL, True), (None, False)])
def test_outputs_are_listed_when_the_view_is_full(
    busy: Caller, view: run_pb2.View.ValueType | None, is_whole: bool
) -> None:
    run_id = ended(busy, task("good"), task("bad", after=["good"], function="fail"))
    good, bad = busy.tasks.ListTasks(task_pb2.ListTasksRequest(run_id=run_id, view=view)).tasks
    assert ("out" in good.outputs) is is_whole
    assert bad.failure.message == "broken"
    assert bool(bad.failure.traceback) is is_whole
    found = busy.workflows.GetRun(workflow_pb2.GetRunRequest(run_id=run_id, view=view)).run
    assert found.failure.message == "broken"
    assert bool(found.failure.traceback) is is_whole


def test_workflows_are_listed_with_tasks_when_the_view_is_full() -> None:
    with serving_aside(NoWorkers()) as address, calling(address) as caller:
        spec = workflow_pb2.WorkflowSpec(functions={"work": function()}, tasks=[task()], display_name="named")
        caller.workflows.CreateWorkflow(workflow_pb2.CreateWorkflowRequest(spec=spec))
        for view, count in ((run_pb2.VIEW_BASIC, 0), (run_pb2.VIEW_FULL, 1)):
            (found,) = caller.workflows.ListWorkflows(workflow_pb2.ListWorkflowsRequest(view=view)).workflows
            assert (found.spec.display_name, len(found.spec.tasks), len(found.spec.functions)) == (
                "named",
                count,
                count,
            )
