"""Stubs, requests and refusals for tests of the services."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from lattice.v1 import (
    artifact_pb2_grpc,
    cluster_pb2_grpc,
    payload_pb2,
    results_pb2_grpc,
    service_pb2_grpc,
    task_pb2,
    task_pb2_grpc,
    worker_pb2_grpc,
    workflow_pb2,
    workflow_pb2_grpc,
)

CODE = """
def work(params):
    print("working")
    return {"out": params.get("x", 0)}

def fail(params):
    raise ValueError("broken")

def wait(params):
    import time
    time.sleep(600)
"""


class Caller:
    """A channel to a server, and its services."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.workflows = workflow_pb2_grpc.WorkflowServiceStub(channel)
        self.tasks = task_pb2_grpc.TaskServiceStub(channel)
        self.results = results_pb2_grpc.ResultsServiceStub(channel)
        self.artifacts = artifact_pb2_grpc.ArtifactServiceStub(channel)
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(channel)
        self.services = service_pb2_grpc.ServicesServiceStub(channel)
        self.workers = worker_pb2_grpc.WorkerServiceStub(channel)


@contextmanager
def calling(address: str) -> Iterator[Caller]:
    """Call a server while the block runs."""
    with grpc.insecure_channel(address) as channel:
        yield Caller(channel)


@dataclass
class Refusal:
    """A status as a caller reads it; filled in when the block ends."""

    code: grpc.StatusCode = grpc.StatusCode.OK
    reason: str = ""
    message: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    violations: dict[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None


@contextmanager
def refused(code: grpc.StatusCode, reason: str) -> Iterator[Refusal]:
    """Expect a call to end with this code and this `ErrorInfo.reason` of the domain `lattice`."""
    refusal = Refusal()
    with pytest.raises(grpc.RpcError) as caught:
        yield refusal
    error: Any = caught.value
    refusal.code, refusal.message = error.code(), error.details()
    assert refusal.code is code, f"{refusal.code}: {refusal.message}"
    status = rpc_status.from_call(error)
    assert status is not None, "the status carries no details"
    for detail in status.details:
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            assert info.domain == "lattice"
            refusal.reason, refusal.metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            refusal.violations = {v.field: v.description for v in bad.field_violations}
        elif detail.Unpack(retry):
            refusal.retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
    assert refusal.reason == reason, f"{refusal.reason}: {refusal.message}"


def fresh(kind: str = "run") -> str:
    """Return a new id."""
    return f"{kind}-{uuid4().hex}"


def function(name: str = "work") -> task_pb2.Function:
    """Return one of the functions above."""
    source = task_pb2.PythonSource(code=CODE, name=name)
    return task_pb2.Function(python={"source": source, "call_style": task_pb2.CALL_STYLE_PARAMS})


def json_payload(text: str) -> payload_pb2.Payload:
    """Return a JSON payload."""
    return payload_pb2.Payload(json=text)


def value(text: str) -> payload_pb2.Binding:
    """Return a binding to a JSON value."""
    return payload_pb2.Binding(payload=json_payload(text))


def output(task_id: str, name: str = "out") -> payload_pb2.Binding:
    """Return a binding to a task's output."""
    return payload_pb2.Binding(output=payload_pb2.OutputRef(task_id=task_id, output=name))


def task(task_id: str = "t", after: Sequence[str] = (), function: str = "work", **more: Any) -> task_pb2.TaskSpec:
    """Return a task with one output `out`."""
    return task_pb2.TaskSpec(task_id=task_id, function=function, outputs=["out"], after=after, **more)


def graph(*tasks: task_pb2.TaskSpec, **more: Any) -> workflow_pb2.WorkflowSpec:
    """Return a workflow of these tasks, with the functions they may call."""
    functions = {name: function(name) for name in ("work", "fail", "wait")}
    return workflow_pb2.WorkflowSpec(functions=functions, tasks=tasks, **more)


def run(caller: Caller, *tasks: task_pb2.TaskSpec, **more: Any) -> workflow_pb2.RunWorkflowResponse:
    """Run a workflow of these tasks."""
    request = workflow_pb2.RunWorkflowRequest(workflow=graph(*(tasks or (task(),))), **more)
    return caller.workflows.RunWorkflow(request)


def ended(caller: Caller, *tasks: task_pb2.TaskSpec) -> str:
    """Run a workflow of these tasks to its end; return the run's id."""
    request = workflow_pb2.RunWorkflowRequest(workflow=graph(*(tasks or (task(),))))
    *_, last = caller.workflows.ExecuteWorkflow(workflow_pb2.ExecuteWorkflowRequest(run=request), timeout=60)
    found: str = last.ended.run.run_id
    return found


def walk(call: Callable[[Any], Any], request: Any, items: str, page_size: int) -> list[list[Any]]:
    """Return all pages of a list, following its tokens."""
    pages = []
    request.page_size = page_size
    while True:
        response = call(request)
        pages.append(list(getattr(response, items)))
        request.page_token = response.next_page_token
        if not request.page_token:
            return pages
