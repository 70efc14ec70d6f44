"""Owns how an instance becomes a run with one task, and how the end of that run becomes the end of the instance.

Rule: the task has no inputs: the program of an instance is the answer to its first question, so that no graph, event or
log of the run shows it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from uuid import uuid4

from lattice_server.core.errors import LatticeError
from lattice_server.core.messages import TaskCancelled, TaskFailed, TaskRetrying, TaskSucceeded
from lattice_server.core.model import Failure, Function, RetryPolicy, TaskSpec, WorkflowSpec
from lattice_server.core.model import FailureKind as TaskFailureKind
from lattice_server.core.services.failures import failure_of, last_lines
from lattice_server.core.services.instances import Instance
from lattice_server.core.services.model import FailureKind, ServiceFailure, ServiceSpec
from lattice_server.core.tenancy import Reach
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.services.entry import ServiceEntry

TASK_ID = "instance"
LABEL = "lattice/service"
# A failed attempt is the machine's business: another one would start without it.
ONCE = RetryPolicy(max_attempts=1, max_worker_losses=1)
AttemptEnd = TaskSucceeded | TaskFailed | TaskCancelled | TaskRetrying


def start_run(orchestrator: Orchestrator, service: ServiceEntry, instance: Instance, function: Function) -> RunEntry:
    """Start the run of an instance. Raises LatticeError when it is refused."""
    spec = instance.spec
    task = TaskSpec(
        task_id=TASK_ID,
        function=replace(function, bundle=service.bundle) if service.bundle is not None else function,
        display_name=f"instance {instance.instance_id}",
        outputs=("ended",),
        resources=spec.resources,
        retry=ONCE,
        node_selector=spec.node_selector,
        is_service=True,
    )
    run_id = f"service-{instance.instance_id}-{uuid4().hex[:8]}"
    entry, _ = orchestrator.start_run(
        run_id,
        WorkflowSpec(tasks=(task,), display_name=f"service {spec.name}"),
        parameters={},
        labels={LABEL: spec.name},
        priority=0,
        tenant=service.tenant,
        fingerprint=run_id,
        reach=Reach(service.tenant),
        is_transient=True,
    )
    return entry


def refusal(error: LatticeError) -> ServiceFailure:
    """Return the failure of an instance whose run was refused."""
    # A full queue has room later; no other refusal heals by itself.
    kind = FailureKind.LOST if error.retry_after_s is not None else FailureKind.NOT_STARTED
    return ServiceFailure(kind, error.message)


def program_of(spec: ServiceSpec, instance: Instance) -> dict[str, Any]:
    """Return the answer to the first question of an instance."""
    health = spec.health
    return {
        "instance_id": instance.instance_id,
        "node_ip": instance.node_ip,
        "service": spec.name,
        "command": list(spec.command),
        "working_directory": spec.working_directory,
        "entrypoint": spec.entrypoint,
        "function": spec.function.hex(),
        "environment": dict(spec.environment),
        "secrets": sorted(spec.secrets),
        "reach": spec.reach.value,
        "model": spec.model,
        "engine": spec.engine,
        "threads": max(1, int(spec.resources.cpu)),
        "health": {
            "http_path": health.http_path,
            "interval_s": health.interval_s,
            "timeout_s": health.timeout_s,
        },
    }


def end_of(service: ServiceEntry, instance_id: str, fact: AttemptEnd) -> ServiceFailure | None:
    """Return why an instance ended that reported no failure; None when its program was asked to end."""
    lines = service.log.tail(instance_id)
    match fact:
        case TaskSucceeded():
            return None
        case TaskCancelled():
            text = f"its run was cancelled: {fact.failure.message}"
            return ServiceFailure(FailureKind.LOST, text, last_lines=last_lines(lines))
        case TaskFailed() | TaskRetrying():
            return _of_attempt(fact.failure, lines)


def reported(service: ServiceEntry, instance: Instance, report: Mapping[str, Any]) -> ServiceFailure:
    """Return the failure that an instance reported about its program."""
    status, signal = report.get("exit_status"), report.get("signal")
    lines = service.log.tail(instance.instance_id)
    spec = instance.spec
    return failure_of(
        status if isinstance(status, int) else None,
        signal if isinstance(signal, int) else 0,
        lines,
        is_engine=bool(spec.engine),
        message=str(report.get("message") or ""),
    )


def _of_attempt(failure: Failure, lines: list[str]) -> ServiceFailure:
    kinds = {
        TaskFailureKind.WORKER_LOST: FailureKind.LOST,
        TaskFailureKind.OUT_OF_MEMORY: FailureKind.OUT_OF_MEMORY,
        TaskFailureKind.PAYLOAD: FailureKind.NOT_STARTED,
    }
    kind = kinds.get(failure.kind, FailureKind.LOST)
    return ServiceFailure(kind, failure.message, last_lines=last_lines(lines))
