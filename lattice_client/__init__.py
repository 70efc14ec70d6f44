"""The Python client: declares workflows, runs them and reads their results.

A name is imported when it is first used, so that a program, a task or a command imports few modules. A module of
tasks needs no gRPC.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from lattice_client import context

if TYPE_CHECKING:
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
else:
    # The names above, by their modules.
    _NAMES = {
        "client": (
            "AsyncLatticeClient",
            "AsyncLatticeWorkflow",
        ),
        "convert.events": ("RunEvent",),
        "errors": (
            "AbortedError",
            "AlreadyExistsError",
            "ClientClosedError",
            "DecodeError",
            "ForkError",
            "InternalError",
            "InvalidArgumentError",
            "LatticeError",
            "NotFoundError",
            "OutOfRangeError",
            "PermissionDeniedError",
            "PreconditionError",
            "RequestError",
            "ResourceExhaustedError",
            "RunCancelledError",
            "RunError",
            "RunTimeoutError",
            "SecurityError",
            "ServiceFailedError",
            "StreamInterruptedError",
            "TargetError",
            "TaskDefinitionError",
            "TaskFailedError",
            "UnauthenticatedError",
            "UnavailableError",
            "UntrustedPayloadError",
        ),
        "graph.definition": ("TaskDefinition",),
        "graph.entrypoint": ("entrypoint",),
        "graph.environment": ("secret",),
        "graph.nodes": ("LatticeTask",),
        "graph.outputs": (
            "Parameter",
            "TaskOutput",
        ),
        "graph.task": ("task",),
        "graph.template": ("template",),
        "langgraph": ("LangGraphClient",),
        "runs.open_run": ("AsyncOpenRun",),
        "runs.questions": ("Question",),
        "runs.run": ("AsyncRun",),
        "runs.streams": (
            "Chunk",
            "Progress",
        ),
        "runs.sync_run": (
            "OpenRun",
            "Run",
        ),
        "sync": (
            "LatticeClient",
            "LatticeWorkflow",
        ),
    }
    _MODULES = {name: module for module, names in _NAMES.items() for name in names}

    def __getattr__(name):
        """Import a name that is used for the first time."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        return found

    def __dir__():
        return sorted({*globals(), *_MODULES})


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
