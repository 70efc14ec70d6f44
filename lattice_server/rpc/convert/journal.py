"""Converts runs and workflows into the bytes of a journal, and back.

Rule: the bytes are messages of the contract, encoded deterministically. Code is named by digest in them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from lattice.v1 import run_pb2, task_pb2, worker_pb2, workflow_pb2

from lattice_server.core.messages import RunEvent, TaskFailed, TasksAdded, TaskStarted, TaskSucceeded
from lattice_server.core.model import Bundle, FailurePolicy, Function, Isolation, Payload, TaskSpec, WorkflowSpec
from lattice_server.core.scheduling.batching import BatchRule
from lattice_server.core.steps import Steps, stepwise
from lattice_server.engine.recording.journal_records import Code
from lattice_server.engine.recording.run_codec import ReadCode, RecordedEvent, RunSettings
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.stores.code_store import CodeStore
from lattice_server.rpc.convert.events import event_to_proto
from lattice_server.rpc.convert.functions import bundle_from_proto, code_to_proto, function_from_proto
from lattice_server.rpc.convert.payloads import fill_payload, payload_from_proto, payloads_to_proto
from lattice_server.rpc.convert.recorded_events import event_from_proto
from lattice_server.rpc.convert.runs import run_to_proto
from lattice_server.rpc.convert.tasks import task_from_proto, task_to_spec
from lattice_server.rpc.convert.times import fill_timestamp, limit_from_proto

FAILURE_POLICY_FROM_PROTO = {
    workflow_pb2.FAILURE_POLICY_FAIL_FAST: FailurePolicy.FAIL_FAST,
    workflow_pb2.FAILURE_POLICY_FINISH_INDEPENDENT: FailurePolicy.FINISH_INDEPENDENT,
}
FAILURE_POLICY_TO_PROTO = {core: proto for proto, core in FAILURE_POLICY_FROM_PROTO.items()}
M = TypeVar("M", bound=Message)
# An accepted graph is restored, even if it exceeds the present limits.
NO_LIMIT = 1 << 62


class ContractCodec:
    """A `RunCodec` of messages of the contract. Functions that `code` has are not made again.

    The batching `rules` and the `least` isolation of the server apply to stored workflows, which are recorded as their
    callers sent them.
    """

    def __init__(self, code: CodeStore, rules: Sequence[BatchRule] = (), least: Isolation = Isolation.NONE) -> None:
        self._code = code
        self._rules = rules
        self._least = least

    def settings(self, entry: RunEntry, parameters: Mapping[str, Payload]) -> bytes:
        """See `RunCodec`."""
        message = run_to_proto(entry)
        for name, payload in parameters.items():
            fill_payload(message.parameters[name], payload)
        return _bytes(message)

    def workflow(self, spec: WorkflowSpec) -> Steps[bytes]:
        """See `RunCodec`."""
        head = workflow_pb2.WorkflowSpec(
            display_name=spec.display_name,
            failure_policy=FAILURE_POLICY_TO_PROTO[spec.failure_policy],
            parameters=payloads_to_proto(spec.parameters),
        )
        return _bytes(head) + (yield from self.tasks(spec.tasks))

    def tasks(self, tasks: Sequence[TaskSpec]) -> Steps[bytes]:
        """See `RunCodec`."""
        parts: list[bytes] = []
        digests: dict[str, None] = {}
        part = workflow_pb2.WorkflowSpec()
        for task, is_step in stepwise(tasks):
            digests[task.function.digest] = None
            part.tasks.append(task_to_spec(task))
            if is_step:
                parts.append(_bytes(part))
                part = workflow_pb2.WorkflowSpec()
                yield
        for digest in digests:
            part.functions[digest].digest = digest
        # Messages that are put one after the other are one message with the items of all.
        return b"".join([*parts, _bytes(part)])

    def event(self, entry: RunEntry, event: RunEvent) -> tuple[bytes, bytes]:
        """See `RunCodec`."""
        replay = worker_pb2.Report()
        match event.fact:
            case TaskStarted(task_id=task_id, lease_id=lease_id, item=item):
                replay.lease_id, replay.item = lease_id, item
                fill_timestamp(replay.time, entry.start_times_s.get(task_id))
            case TaskSucceeded(task_id=task_id, split=split):
                fill_timestamp(replay.time, entry.end_times_s.get(task_id))
                for name, items in split.items():
                    for payload in items:
                        fill_payload(replay.succeeded.split[name].items.add(), payload)
            case TasksAdded(task_ids=task_ids):
                replay.spawned.called = any(entry.run.tasks[task_id].is_called for task_id in task_ids)
            case TaskFailed(task_id=task_id):
                fill_timestamp(replay.time, entry.end_times_s.get(task_id))
            case _:
                pass
        return _bytes(event_to_proto(entry.run.tasks, event)), _bytes(replay)

    def summary(self, entry: RunEntry) -> bytes:
        """See `RunCodec`."""
        return _bytes(run_to_proto(entry, is_brief=True))

    def stored(self, definition: object) -> bytes:
        """See `RunCodec`."""
        assert isinstance(definition, workflow_pb2.WorkflowSpec)
        return _bytes(definition)

    def code(self, functions: Iterable[Function]) -> tuple[Code, ...]:
        """See `RunCodec`."""
        found: dict[str, Code] = {}
        for function in functions:
            message, zipped = code_to_proto(function)
            found[function.digest] = Code(function.digest, function.size_bytes, message.SerializeToString)
            if function.bundle is not None and zipped is not None:
                bundle = function.bundle
                found[bundle.digest] = Code(bundle.digest, bundle.size_bytes, zipped.SerializeToString)
        return tuple(found.values())

    def read_settings(self, data: bytes) -> RunSettings:
        """See `RunCodec`."""
        message = _read(run_pb2.Run, data)
        return RunSettings(
            labels=dict(message.labels),
            priority=message.priority,
            workflow_id=message.workflow_id,
            timeout_s=limit_from_proto(message, "timeout", "timeout"),
            parameters={
                name: payload_from_proto(payload, "parameters", NO_LIMIT)
                for name, payload in message.parameters.items()
            },
            retried_run_id=message.retried_run_id,
            is_open=message.open,
            disconnect_grace_s=limit_from_proto(message, "cancel_on_disconnect", "cancel_on_disconnect"),
        )

    def read_workflow(self, data: bytes, code: ReadCode) -> Steps[WorkflowSpec]:
        """See `RunCodec`."""
        message = _read(workflow_pb2.WorkflowSpec, data)
        functions = {name: self._function(found.digest, code) for name, found in message.functions.items()}
        tasks: list[TaskSpec] = []
        for (index, task), is_step in stepwise(enumerate(message.tasks)):
            tasks.append(task_from_proto(task, f"tasks[{index}]", functions, NO_LIMIT))
            if is_step:
                yield
        return _workflow(message, tasks)

    def read_event(self, key: str, body: bytes, replay: bytes) -> RecordedEvent:
        """See `RunCodec`."""
        return event_from_proto(key, _read(run_pb2.RunEvent, body), _read(worker_pb2.Report, replay))

    def read_stored(self, data: bytes, code: ReadCode) -> tuple[object, WorkflowSpec, dict[str, Function]]:
        """See `RunCodec`."""
        message = _read(workflow_pb2.WorkflowSpec, data)
        functions = {name: self._function(found.digest, code) for name, found in message.functions.items()}
        tasks = [
            task_from_proto(task, f"tasks[{index}]", functions, NO_LIMIT, self._rules, self._least)
            for index, task in enumerate(message.tasks)
        ]
        return message, _workflow(message, tasks), functions

    def _function(self, digest: str, code: ReadCode) -> Function:
        known = self._code.find(digest)
        if isinstance(known, Function):
            return known
        return function_from_proto(_read(task_pb2.Function, code(digest)), lambda name: self._bundle(name, code))

    def _bundle(self, digest: str, code: ReadCode) -> Bundle:
        known = self._code.find(digest)
        return known if isinstance(known, Bundle) else bundle_from_proto(_read(task_pb2.CodeBundle, code(digest)))


def _workflow(message: workflow_pb2.WorkflowSpec, tasks: Sequence[TaskSpec]) -> WorkflowSpec:
    return WorkflowSpec(
        tasks=tuple(tasks),
        display_name=message.display_name,
        parameters={
            name: payload_from_proto(payload, "parameters", NO_LIMIT) for name, payload in message.parameters.items()
        },
        failure_policy=FAILURE_POLICY_FROM_PROTO.get(message.failure_policy, FailurePolicy.FAIL_FAST),
    )


def _read(kind: type[M], data: bytes) -> M:
    """Return a message. Raises ValueError."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise ValueError(f"the bytes are no {kind.DESCRIPTOR.name}: {error}") from None


def _bytes(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)
