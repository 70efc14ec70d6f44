"""Owns graphs that one message cannot carry. Rule: where a graph is cut changes nothing of what is run."""

from collections.abc import Iterator
from dataclasses import dataclass
from uuid import uuid4

from google.protobuf.message import Message
from lattice.v1 import cluster_pb2, task_pb2, workflow_pb2

from lattice_client.errors import TaskDefinitionError
from lattice_client.transport.channel import Channel

# What every server takes in one message; see `Limits`.
ALWAYS_BYTES = 1024 * 1024
ALWAYS_TASKS = 1000
# What a message has around each thing in it, and around all of them.
ENTRY_BYTES = 16
ENVELOPE_BYTES = 1024


@dataclass(slots=True)
class Parcel:
    """A graph on its way: tasks, functions and bundles; `draft_id` once its parts were sent."""

    spec: workflow_pb2.WorkflowSpec
    draft_id: str = ""

    def carried(self) -> workflow_pb2.WorkflowSpec:
        """Return what the last message has to carry."""
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
    """Cuts graphs as the server's limits say. Of an older server a limit may be zero: it has none."""

    message_bytes: int
    message_tasks: int

    @classmethod
    async def needed(cls, rpc: Channel, spec: workflow_pb2.WorkflowSpec, around_bytes: int = 0) -> "Parts | None":
        """Return how a graph is cut; None when one message carries it and `around_bytes` more.

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
        """Yield the parts of a draft that has the bundles, functions and tasks of a workflow, in this order.

        Raises TaskDefinitionError for something that is too large for a message by itself.
        """
        draft_id, number = uuid4().hex, 0
        room = self.message_bytes - ENVELOPE_BYTES
        part = workflow_pb2.AddTasksRequest()
        size = count = 0
        for name, thing in _things(spec):
            own = thing.ByteSize() + len(name.encode()) + ENTRY_BYTES
            if own > room:
                raise self.refusal(name, thing)
            if count and (size + own > room or count == self.message_tasks):
                yield _numbered(part, draft_id, number)
                part, size, count, number = workflow_pb2.AddTasksRequest(), 0, 0, number + 1
            if isinstance(thing, task_pb2.TaskSpec):
                part.tasks.append(thing)
            elif isinstance(thing, task_pb2.Function):
                part.functions[name].CopyFrom(thing)
            elif isinstance(thing, task_pb2.CodeBundle):
                part.bundles.append(thing)
            size, count = size + own, count + 1
        yield _numbered(part, draft_id, number)

    def refusal(self, name: str, thing: Message) -> TaskDefinitionError:
        """Return the error for something that is too large for a message by itself."""
        limit = f"takes {thing.ByteSize()} bytes, and the server takes {self.message_bytes} in one message"
        if isinstance(thing, task_pb2.TaskSpec):
            text = f"the definition of task {thing.task_id!r} {limit}"
            return TaskDefinitionError(f"{text}; join its many small inputs to a large one, which is uploaded")
        if isinstance(thing, task_pb2.CodeBundle):
            text = f"what a task needs of your own modules and files {limit}"
            return TaskDefinitionError(f"{text}; leave things out with exclude=[...], or install them on the workers")
        text = f"task {name!r}: its function, with all the values it refers to, {limit}"
        return TaskDefinitionError(f"{text}; give it large values as inputs, which are uploaded")


def _things(spec: workflow_pb2.WorkflowSpec) -> Iterator[tuple[str, Message]]:
    for bundle in spec.bundles:
        yield "", bundle
    yield from spec.functions.items()
    for task in spec.tasks:
        yield "", task


def _numbered(part: workflow_pb2.AddTasksRequest, draft_id: str, number: int) -> workflow_pb2.AddTasksRequest:
    part.draft_id, part.expected_revision, part.request_id = draft_id, number, f"{draft_id}-{number}"
    return part
