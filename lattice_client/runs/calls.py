"""Owns the calls that read or change runs, stored workflows and nodes. Rule: a repeated call changes nothing more."""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from lattice.v1 import cluster_pb2, run_pb2, task_pb2, workflow_pb2

from lattice_client.convert.events import run_state
from lattice_client.graph.names import texts_of
from lattice_client.runs.paging import PAGE_SIZE, pages
from lattice_client.runs.questions import inline_payload
from lattice_client.transport.channel import Channel
from lattice_client.transport.requests import check_wait, duration, made, whole_number


class Calls:
    """The calls of one server with one answer each; `AsyncLatticeClient` documents them."""

    def __init__(self, channel: Channel) -> None:
        self._rpc = channel

    async def describe_run(self, run_id: str) -> run_pb2.Run:
        """Return a run in its present state."""
        request = made(workflow_pb2.GetRunRequest, run_id=run_id, view=run_pb2.VIEW_FULL)
        return (await self._rpc.call(self._rpc.workflows.GetRun, request)).run

    async def list_runs(self, limit: int, states: Sequence[str], labels: Mapping[str, str] | None) -> list[run_pb2.Run]:
        """Return the newest runs with one of some states and all of some labels."""
        limit = whole_number(limit, "limit")
        numbers = [run_state(state) for state in texts_of("the states of runs", "a list of states", states)]
        request = made(workflow_pb2.ListRunsRequest, page_size=min(limit, PAGE_SIZE), states=numbers, labels=labels)
        found: list[run_pb2.Run] = []
        async for page in pages(self._rpc, self._rpc.workflows.ListRuns, request):
            found.extend(page.runs)
            if len(found) >= limit:
                break
        return found[:limit]

    async def list_workflows(self) -> list[workflow_pb2.Workflow]:
        """Return the stored workflows."""
        request = workflow_pb2.ListWorkflowsRequest(page_size=PAGE_SIZE)
        found = pages(self._rpc, self._rpc.workflows.ListWorkflows, request)
        return [workflow async for page in found for workflow in page.workflows]

    async def delete_workflow(self, workflow_id: str) -> None:
        """Delete a stored workflow."""
        request = made(workflow_pb2.DeleteWorkflowRequest, workflow_id=workflow_id)
        await self._rpc.call(self._rpc.workflows.DeleteWorkflow, request)

    async def run_graph(self, run_id: str) -> list[workflow_pb2.GraphTask]:
        """Return a run's tasks with their dependencies."""
        request = made(workflow_pb2.GetRunGraphRequest, run_id=run_id, page_size=PAGE_SIZE)
        found = pages(self._rpc, self._rpc.workflows.GetRunGraph, request)
        return [task async for page in found for task in page.tasks]

    async def describe_task(self, run_id: str, task_id: str) -> run_pb2.TaskRun:
        """Return a task in its present state, with its outputs and the traceback of its failure."""
        request = made(task_pb2.GetTaskRequest, run_id=run_id, task_id=task_id)
        return (await self._rpc.call(self._rpc.tasks.GetTask, request)).task

    async def queued_tasks(self, run_id: str, limit: int) -> list[run_pb2.TaskRun]:
        """Return the first queued tasks of a run."""
        states = [run_pb2.TASK_STATE_QUEUED]
        request = made(task_pb2.ListTasksRequest, run_id=run_id, states=states, page_size=limit)
        return list((await self._rpc.call(self._rpc.tasks.ListTasks, request)).tasks)

    async def explain(self, run_id: str, task_id: str) -> task_pb2.ExplainTaskResponse:
        """Return why a task is queued or not ready."""
        request = made(task_pb2.ExplainTaskRequest, run_id=run_id, task_id=task_id)
        return await self._rpc.call(self._rpc.tasks.ExplainTask, request)

    async def cancel_run(self, run_id: str, reason: str = "") -> run_pb2.Run:
        """Cancel a run."""
        request = made(workflow_pb2.CancelRunRequest, run_id=run_id, reason=reason, request_id=uuid4().hex)
        return (await self._rpc.call(self._rpc.workflows.CancelRun, request)).run

    async def delete_run(self, run_id: str) -> None:
        """Delete a run that has ended."""
        request = made(workflow_pb2.DeleteRunRequest, run_id=run_id, request_id=uuid4().hex)
        await self._rpc.call(self._rpc.workflows.DeleteRun, request)

    async def signal_run(self, run_id: str, name: str, value: Any) -> None:
        """Send a signal to a run."""
        limit_bytes = (await self._rpc.limits()).question_bytes
        payload = inline_payload(value, f"the value of signal {name!r}", limit_bytes)
        request = made(workflow_pb2.SignalRunRequest, run_id=run_id, name=name, value=payload, request_id=uuid4().hex)
        await self._rpc.call(self._rpc.workflows.SignalRun, request)

    async def cancel_task(self, run_id: str, task_id: str) -> run_pb2.TaskRun:
        """Cancel one task of a run."""
        request = made(task_pb2.CancelTaskRequest, run_id=run_id, task_id=task_id, request_id=uuid4().hex)
        return (await self._rpc.call(self._rpc.tasks.CancelTask, request)).task

    async def retry_run(self, run_id: str, new_run_id: str, secrets: Mapping[str, str]) -> str:
        """Start a run that repeats the unfinished tasks of an ended run, with values of secrets; return its id."""
        new_run_id = new_run_id or f"run-{uuid4().hex}"
        request = made(workflow_pb2.RetryRunRequest, run_id=run_id, new_run_id=new_run_id, secrets=secrets)
        return (await self._rpc.call(self._rpc.workflows.RetryRun, request)).run.run_id

    async def nodes(self) -> list[cluster_pb2.Node]:
        """Return the nodes."""
        request = cluster_pb2.ListNodesRequest(page_size=PAGE_SIZE)
        return [node async for page in pages(self._rpc, self._rpc.cluster.ListNodes, request) for node in page.nodes]

    async def drain_node(self, node_id: str, deadline_s: float | None = None) -> cluster_pb2.Node:
        """Drain a node; return it in its present state."""
        check_wait(deadline_s, "deadline")
        limit = None if deadline_s is None else duration(deadline_s)
        request = made(cluster_pb2.DrainNodeRequest, node_id=node_id, request_id=uuid4().hex, deadline=limit)
        return (await self._rpc.call(self._rpc.cluster.DrainNode, request)).node

    async def server_info(self) -> cluster_pb2.GetServerInfoResponse:
        """Return the server's version, limits and load."""
        return await self._rpc.call(self._rpc.cluster.GetServerInfo, cluster_pb2.GetServerInfoRequest())
