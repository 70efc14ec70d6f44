"""The Python client: declares workflows, runs them and reads their results."""

import lattice_client.transport.grpc_import  # noqa: F401  # before any other import of gRPC
from lattice_client import context
from lattice_client.client import AsyncLatticeClient, AsyncLatticeWorkflow
from lattice_client.convert.events import RunEvent
from lattice_client.errors import (
    AbortedError,
    AlreadyExistsError,
    ClientClosedError,
    DecodeError,
    ForkError,
    InternalError,
    InvalidArgumentError,
    LatticeError,
    NotFoundError,
    OutOfRangeError,
    PermissionDeniedError,
    PreconditionError,
    RequestError,
    ResourceExhaustedError,
    RunCancelledError,
    RunError,
    RunTimeoutError,
    SecurityError,
    ServiceFailedError,
    StreamInterruptedError,
    TargetError,
    TaskDefinitionError,
    TaskFailedError,
    UnauthenticatedError,
    UnavailableError,
    UntrustedPayloadError,
)
from lattice_client.graph.definition import TaskDefinition
from lattice_client.graph.entrypoint import entrypoint
from lattice_client.graph.environment import secret
from lattice_client.graph.nodes import LatticeTask
from lattice_client.graph.outputs import Parameter, TaskOutput
from lattice_client.graph.task import task
from lattice_client.graph.template import template
from lattice_client.langgraph import LangGraphClient
from lattice_client.runs.open_run import AsyncOpenRun
from lattice_client.runs.questions import Question
from lattice_client.runs.run import AsyncRun
from lattice_client.runs.streams import Chunk, Progress
from lattice_client.runs.sync_run import OpenRun, Run
from lattice_client.sync import LatticeClient, LatticeWorkflow

__all__ = [
    "AbortedError",
    "AlreadyExistsError",
    "AsyncLatticeClient",
    "AsyncLatticeWorkflow",
    "AsyncOpenRun",
    "AsyncRun",
    "Chunk",
    "ClientClosedError",
    "DecodeError",
    "ForkError",
    "InternalError",
    "InvalidArgumentError",
    "LangGraphClient",
    "LatticeClient",
    "LatticeError",
    "LatticeTask",
    "LatticeWorkflow",
    "NotFoundError",
    "OpenRun",
    "OutOfRangeError",
    "Parameter",
    "PermissionDeniedError",
    "PreconditionError",
    "Progress",
    "Question",
    "RequestError",
    "ResourceExhaustedError",
    "Run",
    "RunCancelledError",
    "RunError",
    "RunEvent",
    "RunTimeoutError",
    "SecurityError",
    "ServiceFailedError",
    "StreamInterruptedError",
    "TargetError",
    "TaskDefinition",
    "TaskDefinitionError",
    "TaskFailedError",
    "TaskOutput",
    "UnauthenticatedError",
    "UnavailableError",
    "UntrustedPayloadError",
    "context",
    "entrypoint",
    "secret",
    "task",
    "template",
]
