"""Converts the records of a journal to JSON documents, for `lattice journal export`.

Rule: a message of the contract is in the JSON form of protobuf, with the field names of the contract.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError, Message
from lattice.v1 import run_pb2, task_pb2, worker_pb2, workflow_pb2

from lattice_server.engine.recording.journal_port import JournalDamagedError, JournalReader
from lattice_server.engine.recording.journal_records import StoredRun, StoredWorkflow

Document = dict[str, Any]
Made = TypeVar("Made", bound=Message)


@dataclass(slots=True)
class Exporter:
    """Makes the documents of one export. Code that several runs use is exported once, before the first of them."""

    reader: JournalReader
    damaged: int = 0
    _code: set[str] = field(default_factory=set)

    def run(self, run: StoredRun) -> Iterator[Document]:
        """Yield the documents of a run; the last one is its damage, if any."""
        named = {"run": run.run, "tenant": run.tenant, "run_id": run.run_id}
        try:
            yield {
                "kind": "run",
                **named,
                "accepted": _time(run.accepted_s),
                "ended": None if run.ended_s is None else _time(run.ended_s),
                "results_read": run.is_read,
                "settings": _json(_parsed(run_pb2.Run, self.reader.settings(run.run))),
                "summary": _json(_parsed(run_pb2.Run, run.summary)) if run.summary else None,
            }
            for part, data in enumerate(self.reader.definitions(run.run)):
                definition = _parsed(workflow_pb2.WorkflowSpec, data)
                yield from self._code_of(definition)
                yield {"kind": "definition", "run": run.run, "part": part, "definition": _json(definition)}
            for event in self.reader.events(run.run):
                body, replay = _parsed(run_pb2.RunEvent, event.body), _parsed(worker_pb2.Report, event.replay)
                yield {"kind": "event", "run": run.run, "event": _json(body), "replay": _json(replay)}
            if run.damage:
                raise JournalDamagedError(run.damage)
        except JournalDamagedError as error:
            self.damaged += 1
            yield {"kind": "damage", **named, "reason": str(error)}

    def workflow(self, workflow: StoredWorkflow) -> Iterator[Document]:
        """Yield the documents of a stored workflow; the last one is its damage, if any."""
        named = {"tenant": workflow.tenant, "workflow_id": workflow.workflow_id}
        try:
            if workflow.damage:
                raise JournalDamagedError(workflow.damage)
            definition = _parsed(workflow_pb2.WorkflowSpec, workflow.definition)
            yield from self._code_of(definition)
            stored = {"revision": workflow.revision, "stored": _time(workflow.stored_s)}
            yield {"kind": "workflow", **named, **stored, "definition": _json(definition)}
        except JournalDamagedError as error:
            self.damaged += 1
            yield {"kind": "damage", **named, "reason": str(error)}

    def _code_of(self, definition: workflow_pb2.WorkflowSpec) -> Iterator[Document]:
        """Yield functions that were not exported yet, and their bundles."""
        for used in definition.functions.values():
            if used.digest in self._code:
                continue
            function = _parsed(task_pb2.Function, self._read(used.digest))
            bundle = function.bundle_digest
            if bundle and bundle not in self._code:
                found = _parsed(task_pb2.CodeBundle, self._read(bundle))
                yield {"kind": "bundle", "digest": bundle, "bundle": _json(found)}
                self._code.add(bundle)
            yield {"kind": "function", "digest": used.digest, "function": _json(function)}
            self._code.add(used.digest)

    def _read(self, digest: str) -> bytes:
        code = self.reader.code(digest)
        if code is None:
            raise JournalDamagedError(f"code {digest} is missing")
        return code


def _parsed(kind: type[Made], data: bytes) -> Made:
    """Return a recorded message. Raises JournalDamagedError."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise JournalDamagedError(f"a record is no {kind.DESCRIPTOR.name}: {error}") from error


def _json(message: Message) -> Document:
    return MessageToDict(message, preserving_proto_field_name=True)


def _time(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds")
