"""Converts the messages of the workers' stream. Rule: an unreadable success fails its attempt, not the stream."""

from collections.abc import Iterator
from typing import assert_never

from lattice.v1 import errors_pb2, payload_pb2, run_pb2, worker_pb2

from lattice_server.config import ServerConfig
from lattice_server.core import messages
from lattice_server.core.errors import InvalidError
from lattice_server.core.messages import (
    AnswerQuestion,
    Assign,
    CallOutputs,
    CloseSession,
    DrainWorker,
    RevokeLease,
    SendArtifact,
    StopLease,
    WelcomeWorker,
)
from lattice_server.core.model import Artifact, Failure, FailureKind
from lattice_server.core.tenancy import id_of
from lattice_server.engine.ports import Machine, Membership
from lattice_server.engine.workers.clock_offset import WorkerClock
from lattice_server.rpc.convert.network import access_from_proto
from lattice_server.rpc.convert.payloads import (
    failure_from_proto,
    failure_to_proto,
    fill_binding,
    fill_payload,
    payload_from_proto,
)
from lattice_server.rpc.convert.resources import (
    ISOLATION_FROM_PROTO,
    ISOLATION_TO_PROTO,
    LIMITS_BY_CGROUP,
    capacity_from_proto,
    resources_to_proto,
    runtime_from_proto,
)
from lattice_server.rpc.convert.times import duration, seconds_from

NO_LIMIT = 1 << 62
MAX_REASON = 1000  # Characters.
# Effects that a worker processes after its assignments.
Later = StopLease | RevokeLease | SendArtifact | DrainWorker | CloseSession


def hello_to_event(hello: worker_pb2.Hello, greeting: int) -> messages.WorkerHello:
    """Return the event of a worker that connected; `greeting` numbers its stream."""
    return messages.WorkerHello(
        worker_id=hello.worker_id,
        node_id=hello.node_id,
        session_id=hello.session_id,
        held_lease_ids=tuple(hello.held_lease_ids),
        hostname=hello.hostname,
        node_ip=hello.node_ip,
        capacity=capacity_from_proto(hello.capacity),
        labels=dict(hello.labels),
        isolations=frozenset(
            ISOLATION_FROM_PROTO[level] for level in hello.isolations if level in ISOLATION_FROM_PROTO
        ),
        runtime=runtime_from_proto(hello.runtime),
        pid=hello.pid,
        entrypoints=frozenset(hello.entrypoints),
        isolation_refusals={
            ISOLATION_FROM_PROTO[refusal.isolation]: refusal.reason[:MAX_REASON]
            for refusal in hello.isolation_refusals
            if refusal.isolation in ISOLATION_FROM_PROTO
        },
        network_isolations=frozenset(
            ISOLATION_FROM_PROTO[level] for level in hello.network_isolations if level in ISOLATION_FROM_PROTO
        ),
        limits_memory_by_cgroup=LIMITS_BY_CGROUP.get(hello.memory_enforcement),
        greeting=greeting,
        held=tuple(
            messages.HeldLease(held.lease_id, held.ended, tuple((wait.number, wait.task_id) for wait in held.waits))
            for held in hello.held_leases
        ),
    )


def report_to_event(report: worker_pb2.Report, session_id: str, clock: WorkerClock) -> messages.SchedulerEvent | None:
    """Return the event of a report about an attempt, at its time by the server's clock; None for an unknown fact."""
    named = (session_id, report.lease_id, report.item)
    at = clock.at(seconds_from(report.time)) if report.HasField("time") else None
    match report.WhichOneof("fact"):
        case "awaits":
            return _awaits_event(report.awaits, named)
        case "succeeded":
            try:
                return _success_event(report.succeeded, named, at)
            except InvalidError as error:
                # The report's number counts as received, so the attempt has to end here.
                text = f"the worker reported a success that cannot be read: {error.message}"
                return messages.AttemptFailed(*named, Failure(FailureKind.PAYLOAD, text), at=at)
        case "started":
            return messages.AttemptStarted(*named, at)
        case "failed":
            failure = failure_from_proto(report.failed.failure)
            return messages.AttemptFailed(*named, failure, seconds_from(report.failed.duration), at)
        case "log":
            written = report.log
            is_error = written.stream == run_pb2.LOG_STREAM_STDERR
            return messages.AttemptLogged(*named, is_error, written.text, written.truncated)
        case "network_access":
            return messages.AttemptAccessedNetwork(*named, access_from_proto(report.network_access))
        case "returned":
            return messages.LeaseReturned(session_id, report.lease_id, report.returned.reason)
        case _:
            return None


def _awaits_event(awaits: worker_pb2.AttemptAwaits, named: tuple[str, str, int]) -> messages.AttemptAwaits:
    signal = None
    if awaits.HasField("signal"):
        timeout_s = seconds_from(awaits.signal.timeout) if awaits.signal.HasField("timeout") else None
        signal = messages.AwaitedSignal(awaits.signal.name, timeout_s)
    return messages.AttemptAwaits(*named, awaits.number, awaits.task_id, signal)


def _success_event(
    succeeded: worker_pb2.AttemptSucceeded, named: tuple[str, str, int], at: float | None
) -> messages.AttemptSucceeded:
    outputs = {
        name: payload_from_proto(payload, f'outputs["{name}"]', NO_LIMIT) for name, payload in succeeded.outputs.items()
    }
    split = {
        name: [payload_from_proto(item, f'split["{name}"]', NO_LIMIT) for item in items.items]
        for name, items in succeeded.split.items()
    }
    return messages.AttemptSucceeded(*named, outputs, seconds_from(succeeded.duration), split, at)


def artifacts_in_report(report: worker_pb2.Report) -> Iterator[Artifact]:
    """Yield the artifacts that a report names."""
    payloads: list[payload_pb2.Payload] = []
    match report.WhichOneof("fact"):
        case "succeeded":
            payloads += report.succeeded.outputs.values()
            for items in report.succeeded.split.values():
                payloads += items.items
        case "spawned":
            bindings = [binding for task in report.spawned.tasks for binding in task.inputs.values()]
            while bindings:
                binding = bindings.pop()
                match binding.WhichOneof("source"):
                    case "payload":
                        payloads.append(binding.payload)
                    case "list":
                        bindings += binding.list.items
                    case "map":
                        bindings += binding.map.entries.values()
    for payload in payloads:
        if payload.HasField("artifact"):
            yield Artifact(payload.artifact.artifact_id, payload.artifact.size_bytes, payload.artifact.node_id)


def machine_from_proto(join: worker_pb2.Join, subject: str) -> Machine:
    """Return the machine that a subject offers."""
    capacity = capacity_from_proto(join.capacity)
    return Machine(join.node_id, join.hostname, join.node_ip, capacity, dict(join.labels), subject)


def joined_to_proto(membership: Membership, config: ServerConfig) -> worker_pb2.Joined:
    """Return the answer to a machine that joined."""
    joined = worker_pb2.Joined(
        heartbeat_interval=duration(config.heartbeat_interval_s), silence_limit=duration(config.silence_limit_s)
    )
    if (ray := membership.ray) is not None:
        joined.ray.address, joined.ray.token = ray.address, ray.token
        joined.ray.resource, joined.ray.version = ray.resource, ray.version
    return joined


def welcome_to_proto(effect: WelcomeWorker, config: ServerConfig, server_id: str) -> worker_pb2.Welcome:
    """Return the answer to a worker that connected."""
    return worker_pb2.Welcome(
        session_id=effect.session_id,
        resumed=effect.resumed,
        heartbeat_interval=duration(config.heartbeat_interval_s),
        session_ttl=duration(config.session_ttl_s),
        drop_lease_ids=effect.drop_lease_ids,
        inline_limit_bytes=config.inline_limit_bytes,
        log_limit_bytes=config.log_limit_bytes,
        silence_limit=duration(config.silence_limit_s),
        server_id=server_id,
        drop_artifact_ids=effect.drop_artifact_ids,
        message_limit_bytes=config.worker_message_limit_bytes,
        question_limit_bytes=config.question_limit_bytes,
        chunk_limit_bytes=config.chunk_limit_bytes,
        takes_calls=True,
        adopted_lease_ids=effect.adopted_lease_ids,
        takes_signals=True,
    )


def add_assignment(response: worker_pb2.ConnectResponse, effect: Assign) -> worker_pb2.Assignment:
    """Add a lease to a message, in place; return its part of the message."""
    message = response.assignments.add(
        lease_id=effect.lease_id,
        slot=effect.slot,
        tenant=effect.tenant,
        function_digest=effect.function.digest,
        outputs=effect.outputs,
        isolation=ISOLATION_TO_PROTO[effect.isolation],
        resources=resources_to_proto(effect.resources),
        gpu_indices=effect.gpu_indices,
        after_lease_id=effect.after_lease_id,
        batched=effect.is_batched,
        split_outputs=effect.split_outputs,
        sequence=effect.sequence,
        trace_parents=effect.trace_parents,
        environment=dict(effect.environment.variables),
        secret_variables=effect.environment.secrets,
    )
    if effect.network:
        message.sandbox.network.extend(effect.network)
    if effect.timeout_s is not None:
        message.timeout.CopyFrom(duration(effect.timeout_s))
    for member in effect.attempts:
        attempt = message.attempts.add(run_id=id_of(member.run_id), task_id=member.task_id, number=member.attempt)
        for name, binding in member.inputs.items():
            fill_binding(attempt.inputs[name], binding)
    return message


def answer_to_proto(effect: AnswerQuestion) -> worker_pb2.Answer:
    """Return the message of the answer to a question."""
    message = worker_pb2.Answer(sequence=effect.sequence, lease_id=effect.lease_id, number=effect.number)
    match effect.answer:
        case str():
            message.unanswered = effect.answer
        case Failure():
            message.failure.CopyFrom(failure_to_proto(effect.answer) or errors_pb2.Failure())
        case CallOutputs():
            message.outputs.SetInParent()
            for name, found in effect.answer.outputs.items():
                fill_payload(message.outputs.outputs[name], found)
        case payload:
            fill_payload(message.payload, payload)
    return message


def add_later(message: worker_pb2.ConnectResponse, effect: Later) -> None:
    """Write an effect that a worker processes after its assignments into a message."""
    match effect:
        case StopLease():
            message.stop_lease_ids.append(effect.lease_id)
        case RevokeLease():
            message.revoke_lease_ids.append(effect.lease_id)
        case SendArtifact():
            message.send_artifacts.add(
                transfer_id=effect.transfer_id, artifact_id=effect.artifact_id, offset=effect.offset
            )
        case DrainWorker():
            message.drain.SetInParent()
            if effect.deadline_s is not None:
                message.drain.deadline.CopyFrom(duration(effect.deadline_s))
        case CloseSession():
            message.close.reason = worker_pb2.CloseReason.Value(f"CLOSE_REASON_{effect.reason}")
            message.close.message = effect.message
        case _:
            assert_never(effect)
