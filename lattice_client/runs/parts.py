"""Owns sending a graph in several messages. Rule: the division has no effect on the run."""

from collections.abc import Iterator
from dataclasses import dataclass
from uuid import uuid4

from google.protobuf.message import Message
from lattice.v1 import cluster_pb2, task_pb2, workflow_pb2

from lattice_client.errors import TaskDefinitionError
from lattice_client.transport.channel import Channel

# Every server accepts messages up to this size; see `Limits` for the limits of one server.
ALWAYS_BYTES = 1024 * 1024
ALWAYS_TASKS = 1000
# The overhead of each entry in a message, and of the message.
ENTRY_BYTES = 16
ENVELOPE_BYTES = 1024


@dataclass(slots=True)
class GraphMessage:
    """A graph to send: tasks, functions and bundles. `draft_id` names the draft on the server once parts were sent."""

    spec: workflow_pb2.WorkflowSpec
    draft_id: str = ""

    def last_message(self) -> workflow_pb2.WorkflowSpec:
        """Return the workflow for the message that starts or stores it: whole, or its draft when parts were sent."""
        if not self.draft_id:
            return self.spec
        return workflow_pb2.WorkflowSpec(
            display_name=self.spec.display_name,
            parameters=self.spec.parameters,
            failure_policy=self.spec.failure_policy,
            draft_id=self.draft_id,
        )


@dataclass(frozen=True, slots=True)
class Parts:
    """Divides graphs by the server's limits. An older server may report a limit of zero, which means no limit."""

    message_bytes: int
    message_tasks: int

    @classmethod
    async def needed(cls, rpc: Channel, spec: workflow_pb2.WorkflowSpec, around_bytes: int = 0) -> "Parts | None":
        """Return how to divide a graph; None when it fits one message with `around_bytes` of other fields.

        Raises RequestError, ClientClosedError.
        """
        size, tasks = spec.ByteSize() + around_bytes + ENVELOPE_BYTES, len(spec.tasks)
        if size <= ALWAYS_BYTES and tasks <= ALWAYS_TASKS and len(spec.functions) <= ALWAYS_TASKS:
            return None
        limits: cluster_pb2.Limits = await rpc.limits()
        parts = cls(limits.message_bytes or 1 << 62, limits.message_tasks or 1 << 62)
        count = max(tasks, len(spec.functions) + len(spec.bundles) + len(spec.parameters) + 2)
        return None if size <= parts.message_bytes and count <= parts.message_tasks else parts

    def of(self, spec: workflow_pb2.WorkflowSpec) -> Iterator[workflow_pb2.AddTasksRequest]:
        """Yield the messages of a draft: first the bundles of a workflow, then its functions and its tasks.

        Raises TaskDefinitionError for an entry that is larger than a message.
        """
        draft_id, number = uuid4().hex, 0
        limit_bytes = self.message_bytes - ENVELOPE_BYTES
        part = workflow_pb2.AddTasksRequest()
        size = count = 0
        for name, entry in _entries(spec):
            own = entry.ByteSize() + len(name.encode()) + ENTRY_BYTES
            if own > limit_bytes:
                raise self.refusal(name, entry)
            if count and (size + own > limit_bytes or count == self.message_tasks):
                yield _numbered(part, draft_id, number)
                part, size, count, number = workflow_pb2.AddTasksRequest(), 0, 0, number + 1
            if isinstance(entry, task_pb2.TaskSpec):
                part.tasks.append(entry)
            elif isinstance(entry, task_pb2.Function):
                part.functions[name].CopyFrom(entry)
            elif isinstance(entry, task_pb2.CodeBundle):
                part.bundles.append(entry)
            size, count = size + own, count + 1
        yield _numbered(part, draft_id, number)

    def refusal(self, name: str, entry: Message) -> TaskDefinitionError:
        """Return the error for an entry that is larger than a message."""
        limit = f"has {entry.ByteSize()} bytes, and the server accepts {self.message_bytes} in one message"
        if isinstance(entry, task_pb2.TaskSpec):
            text = f"the definition of task {entry.task_id!r} {limit}"
            return TaskDefinitionError(f"{text}; combine its many small inputs into a large one, which is uploaded")
        if isinstance(entry, task_pb2.CodeBundle):
            text = f"the bundle of your own modules and files {limit}"
            return TaskDefinitionError(f"{text}; leave files out with exclude=[...], or install them on the workers")
        text = f"task {name!r}: its function, with all the values it refers to, {limit}"
        return TaskDefinitionError(f"{text}; pass large values as inputs, which are uploaded")


def _entries(spec: workflow_pb2.WorkflowSpec) -> Iterator[tuple[str, Message]]:
    for bundle in spec.bundles:
        yield "", bundle
    yield from spec.functions.items()
    for task in spec.tasks:
        yield "", task


def _numbered(part: workflow_pb2.AddTasksRequest, draft_id: str, number: int) -> workflow_pb2.AddTasksRequest:
    part.draft_id, part.expected_revision, part.request_id = draft_id, number, f"{draft_id}-{number}"
    return part
