"""Converts the messages about streamed output. Rule: an unreadable chunk ends its attempt, not the worker's stream."""

import math
from collections.abc import Iterator

from lattice.v1 import results_pb2, run_pb2, worker_pb2

from lattice_server.core.errors import LatticeError, invalid_field
from lattice_server.core.messages import AttemptProgressed, AttemptStreamed
from lattice_server.core.model import Artifact, Failure, FailureKind, Payload
from lattice_server.engine.runs.chunk_log import Batch, Chunk, Progress
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.rpc.chunking import in_parts
from lattice_server.rpc.convert.payloads import fill_payload, payload_from_proto


def streamed_event(report: worker_pb2.Report, session_id: str, limit_bytes: int) -> AttemptStreamed:
    """Return the event of chunks that an attempt streams, each of at most `limit_bytes`."""
    named = (session_id, report.lease_id, report.item)
    try:
        return AttemptStreamed(*named, tuple(_chunks_of(report.streamed, limit_bytes)))
    except LatticeError as error:
        refusal = Failure(FailureKind.PAYLOAD, f"a chunk of its output cannot be read: {error.message}")
        return AttemptStreamed(*named, (), refusal)


def _chunks_of(streamed: worker_pb2.AttemptStreamed, limit_bytes: int) -> Iterator[Payload]:
    for message in streamed.chunks:
        payload = payload_from_proto(message, "chunks", limit_bytes)
        if isinstance(payload.content, Artifact):
            raise invalid_field("chunks", "a chunk travels inline")
        yield payload


def progressed_event(report: worker_pb2.Report, session_id: str) -> AttemptProgressed | None:
    """Return the event of an attempt that says how far it is; None when its numbers are none."""
    found = report.progressed
    total = found.total if found.HasField("total") else None
    if not math.isfinite(found.done) or (total is not None and not math.isfinite(total)):
        return None
    return AttemptProgressed(session_id, report.lease_id, report.item, found.done, total)


def progress_to_proto(task_id: str, progress: Progress) -> run_pb2.TaskProgress:
    """Return the message of how far an attempt is."""
    return run_pb2.TaskProgress(task_id=task_id, attempt=progress.attempt, done=progress.done, total=progress.total)


def progress_of(entry: RunEntry, task_id: str) -> run_pb2.TaskProgress | None:
    """Return how far the newest attempt of a task is; None when it has not said so."""
    stream = None if entry.chunks is None else entry.chunks.streams.get(task_id)
    return None if stream is None or stream.progress is None else progress_to_proto(task_id, stream.progress)


def batch_to_proto(batch: Batch) -> Iterator[results_pb2.WatchChunksResponse]:
    """Yield the messages that carry a batch: one, unless it would be too large."""
    progress = [progress_to_proto(task_id, found) for task_id, found in batch.progress.items()]
    for part in in_parts(_chunk_to_proto(task_id, chunk) for task_id, chunk in batch.chunks):
        yield results_pb2.WatchChunksResponse(chunks=part, progress=progress)
        progress = []
    if progress:
        yield results_pb2.WatchChunksResponse(progress=progress)


def _chunk_to_proto(task_id: str, chunk: Chunk) -> results_pb2.Chunk:
    message = results_pb2.Chunk(task_id=task_id, sequence=chunk.sequence, attempt=chunk.attempt, index=chunk.index)
    if chunk.payload is None:
        message.restart = True
    else:
        fill_payload(message.payload, chunk.payload)
    return message
