"""Requests that are repeated: carried out once, answered each time, remembered within bounds."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import grpc
import pytest
from lattice.v1 import cluster_pb2, run_pb2, task_pb2, workflow_pb2

from lattice_server.core.errors import ConflictError, NotFoundError
from lattice_server.rpc import callers
from lattice_server.rpc.request_cache import KEPT_S, RequestCache
from tests.server.rpc.callers import Caller, ended, fresh, function, graph, refused, run, task


def add_request(run_id: str, *task_ids: str, request_id: str = "") -> workflow_pb2.AddTasksRequest:
    """Return a request that adds tasks to a run."""
    tasks = [task(task_id) for task_id in task_ids]
    return workflow_pb2.AddTasksRequest(
        run_id=run_id, tasks=tasks, functions={"work": function()}, request_id=request_id
    )


def test_tasks_are_added_once_when_the_request_is_repeated(idle: Caller) -> None:
    run_id, request_id = run(idle).run.run_id, fresh("request")
    answers = [idle.workflows.AddTasks(add_request(run_id, "a", request_id=request_id)) for _ in range(3)]
    assert [answer.revision for answer in answers] == [2, 2, 2]
    assert idle.workflows.GetRun(workflow_pb2.GetRunRequest(run_id=run_id)).run.task_counts.total == 2


def test_tasks_are_refused_as_known_when_no_request_id_tells_that_they_are_repeated(idle: Caller) -> None:
    run_id = run(idle).run.run_id
    idle.workflows.AddTasks(add_request(run_id, "a"))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_WORKFLOW"):
        idle.workflows.AddTasks(add_request(run_id, "a"))


def test_a_request_id_is_refused_when_it_comes_with_other_content(idle: Caller) -> None:
    run_id, request_id = run(idle).run.run_id, fresh("request")
    idle.workflows.AddTasks(add_request(run_id, "a", request_id=request_id))
    with refused(grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_CONFLICT"):
        idle.workflows.AddTasks(add_request(run_id, "b", request_id=request_id))


def test_a_workflow_is_deleted_once_when_the_request_is_repeated(idle: Caller) -> None:
    created = idle.workflows.CreateWorkflow(workflow_pb2.CreateWorkflowRequest(spec=graph(task()))).workflow
    request = workflow_pb2.DeleteWorkflowRequest(workflow_id=created.workflow_id, request_id=fresh("request"))
    assert idle.workflows.DeleteWorkflow(request) == idle.workflows.DeleteWorkflow(request)
    request.request_id = fresh("request")
    with refused(grpc.StatusCode.NOT_FOUND, "WORKFLOW_NOT_FOUND"):
        idle.workflows.DeleteWorkflow(request)


@pytest.mark.parametrize("service", ["workflows.CancelRun", "tasks.CancelTask", "workflows.AddEdges"])
def test_the_first_answer_is_given_when_a_request_is_repeated(idle: Caller, service: str) -> None:
    run_id, request_id = run(idle).run.run_id, fresh("request")
    created = idle.workflows.CreateWorkflow(workflow_pb2.CreateWorkflowRequest(spec=graph(task("a"), task("b"))))
    named = created.workflow.workflow_id
    edge = workflow_pb2.Edge(source_task_id="a", target_task_id="b")
    requests: dict[str, Any] = {
        "workflows.CancelRun": workflow_pb2.CancelRunRequest(run_id=run_id, request_id=request_id),
        "tasks.CancelTask": task_pb2.CancelTaskRequest(run_id=run_id, task_id="t", request_id=request_id),
        "workflows.AddEdges": workflow_pb2.AddEdgesRequest(workflow_id=named, edges=[edge], request_id=request_id),
    }
    stub, _, method = service.partition(".")
    call = getattr(getattr(idle, stub), method)
    first = call(requests[service])
    idle.workflows.AddEdges(workflow_pb2.AddEdgesRequest(workflow_id=named, edges=[edge]))
    assert call(requests[service]) == first


def test_a_node_is_drained_once_when_the_request_is_repeated(busy: Caller) -> None:
    ended(busy)
    (node,) = busy.cluster.ListNodes(cluster_pb2.ListNodesRequest()).nodes
    request = cluster_pb2.DrainNodeRequest(node_id=node.node_id, request_id=fresh("request"))
    first = busy.cluster.DrainNode(request)
    # The server starts a worker in its place; a second drain would end that one too.
    run_id = ended(busy)
    state = busy.workflows.GetRun(workflow_pb2.GetRunRequest(run_id=run_id)).run.state
    assert state == run_pb2.RUN_STATE_SUCCEEDED
    assert busy.cluster.DrainNode(request) == first


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


class Counting:
    """Carries requests out, and counts them."""

    def __init__(self, error: Exception | None = None) -> None:
        self.count = 0
        self.error = error
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def __call__(self) -> workflow_pb2.AddTasksResponse:
        """Carry one out."""
        self.count += 1
        await self.may_end.wait()
        if self.error is not None:
            raise self.error
        return workflow_pb2.AddTasksResponse(revision=self.count)


def play(scenario: Coroutine[Any, Any, None]) -> None:
    callers.enter(callers.TRUSTED)
    asyncio.run(asyncio.wait_for(scenario, 30))


def test_a_request_is_carried_out_again_when_an_hour_has_passed() -> None:
    async def scenario() -> None:
        clock, made = Clock(), Counting()
        cache = RequestCache(clock)
        for now in (0.0, KEPT_S, KEPT_S + 1):
            clock.now = now
            await cache.once(add_request("r", request_id="x"), made)
        assert made.count == 2

    play(scenario())


@pytest.mark.parametrize("bounds", [{"max_answers": 2}, {"max_bytes": 4}])
def test_the_oldest_answer_is_dropped_when_there_are_too_many(bounds: dict[str, int]) -> None:
    async def scenario() -> None:
        made, cache = Counting(), RequestCache(**bounds)  # type: ignore[arg-type]
        for name in ("a", "b", "c", "c", "b"):
            await cache.once(add_request("r", request_id=name), made)
        assert made.count == 3
        await cache.once(add_request("r", request_id="a"), made)
        assert made.count == 4

    play(scenario())


def test_a_request_is_carried_out_again_when_it_failed() -> None:
    async def scenario() -> None:
        made, cache = Counting(NotFoundError("RUN_NOT_FOUND", "no")), RequestCache()
        for _ in range(2):
            with pytest.raises(NotFoundError):
                await cache.once(add_request("r", request_id="x"), made)
        assert made.count == 2

    play(scenario())


def test_request_is_carried_out_once_when_its_caller_reconnects() -> None:
    async def scenario() -> None:
        made, cache = Counting(), RequestCache()
        made.may_end.clear()
        leaving = asyncio.create_task(cache.once(add_request("r", request_id="x"), made))
        await asyncio.sleep(0)
        leaving.cancel()
        back = asyncio.create_task(cache.once(add_request("r", request_id="x"), made))
        await asyncio.sleep(0)
        with pytest.raises(ConflictError):
            await cache.once(add_request("other", request_id="x"), made)
        made.may_end.set()
        assert (await back).revision == 1
        assert made.count == 1

    play(scenario())
