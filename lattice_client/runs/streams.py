"""Owns reading the streamed output of tasks. Rule: a broken stream is resumed after the last chunk of each task."""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lattice.v1 import results_pb2, run_pb2, task_pb2

from lattice_client import errors
from lattice_client.convert import failures
from lattice_client.graph.nodes import LatticeTask
from lattice_client.graph.outputs import TaskOutput
from lattice_client.runs.api import RunApi
from lattice_client.runs.decoding import decoded
from lattice_client.runs.ids import task_id_of
from lattice_client.transport.reconnection import OnLoss, Reconnection
from lattice_client.transport.requests import made, whole_number

Streaming = LatticeTask | TaskOutput | str
OnRestart = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk of a task's streamed output, or the mark of an attempt that replaces an earlier one.

    Attributes:
        task_id: the task; an item of a mapped task is a task of its own.
        sequence: the number among all chunks and marks of the task, from 1; a reader resumes after it.
        attempt: the attempt that streams, from 1.
        index: the position among the chunks of that attempt, from 0.
        value: the value; None in a mark.
        is_restart: whether this is a mark: the chunks before it count no more.
    """

    task_id: str
    sequence: int
    attempt: int
    index: int
    value: Any
    is_restart: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an attempt at a task is. `total` is None when the task does not know it."""

    task_id: str
    attempt: int
    done: float
    total: float | None


async def fetched(
    api: RunApi,
    run_id: str,
    task: Streaming | None = None,
    after: Mapping[str, int] | None = None,
    on_loss: OnLoss | None = None,
) -> AsyncIterator[Chunk | Progress]:
    """Yield the chunks of one task or of all tasks of a run, to its end, with encoded values; and how far tasks are."""
    position = _positions(after)
    task_id = "" if task is None else task_id_of(task)
    reconnection = Reconnection(api.channel, run_id, on_loss)
    is_complete = False
    while not is_complete:
        request = made(results_pb2.WatchChunksRequest, run_id=run_id, task_id=task_id, after_sequence=position)
        try:
            async for response in api.channel.stream(api.channel.results.WatchChunks, request):
                reconnection.succeeded()
                for message in response.chunks:
                    chunk = await _chunk_of(api, message)
                    position[chunk.task_id] = chunk.sequence
                    yield chunk
                for progress in response.progress:
                    yield _progress_of(progress)
                is_complete = response.complete
        except errors.RequestError as error:
            if not is_complete:
                await reconnection.wait(error)


def _positions(after: Any) -> dict[str, int]:
    """Return the numbers of chunks by task. Raises TypeError and ValueError."""
    if after is None:
        return {}
    if not isinstance(after, Mapping):
        raise TypeError(f"after must be a dict of the numbers of chunks by task id, not {after!r}")
    return {task_id_of(task): whole_number(number, f"after[{task!r}]") for task, number in after.items()}


async def chunks(
    api: RunApi, run_id: str, task: Streaming | None, after: Mapping[str, int] | None
) -> AsyncIterator[Chunk]:
    """Yield chunks, each for `value_of`."""
    async for found in fetched(api, run_id, task, after):
        if isinstance(found, Chunk):
            yield found


async def progress(api: RunApi, run_id: str, task: Streaming | None) -> AsyncIterator[Progress]:
    """Yield how far tasks are."""
    async for found in fetched(api, run_id, task):
        if isinstance(found, Progress):
            yield found


async def values(api: RunApi, run_id: str, task: Streaming, on_restart: OnRestart | None) -> AsyncIterator[Chunk]:
    """Yield the chunks of one task whose values are its stream; then raise its error if it failed.

    Raises StreamInterruptedError when chunks are missing, or are replaced and there is no `on_restart`.
    """
    expected: dict[str, tuple[int, int]] = {}  # By task: its attempt and the index of its next chunk.
    async for chunk in chunks(api, run_id, task, None):
        attempt, index = expected.get(chunk.task_id, (chunk.attempt, 0))
        if chunk.is_restart or chunk.attempt != attempt:
            if chunk.task_id in expected:
                _restart(run_id, chunk, on_restart)
            index = 0
        if chunk.index > index:
            text = f"chunks {index} to {chunk.index - 1} of task {chunk.task_id!r} are not kept any more"
            raise errors.StreamInterruptedError(run_id, f"{text}; `chunks()` yields the remaining chunks")
        expected[chunk.task_id] = chunk.attempt, chunk.index + (not chunk.is_restart)
        if not chunk.is_restart:
            yield chunk
    failed = await error_of(api, run_id, task_id_of(task))
    if failed is not None:
        decoded(failed)


async def error_of(api: RunApi, run_id: str, task_id: str) -> errors.RunError | None:
    """Return the error of a task that has ended; None when it has not failed."""
    found = await api.channel.call(
        api.channel.tasks.GetTask, made(task_pb2.GetTaskRequest, run_id=run_id, task_id=task_id)
    )
    return failures.error_of_task(found.task)


def with_value(chunk: Chunk) -> Chunk:
    """Return a chunk with its value decoded. Raises DecodeError."""
    return replace(chunk, value=decoded(chunk.value))


def _restart(run_id: str, chunk: Chunk, on_restart: OnRestart | None) -> None:
    if on_restart is None:
        text = f"attempt {chunk.attempt} of task {chunk.task_id!r} began anew, so that the chunks read so far count no"
        raise errors.StreamInterruptedError(run_id, f"{text} more; read it again, or give on_restart=")
    on_restart(chunk.attempt)


async def _chunk_of(api: RunApi, message: results_pb2.Chunk) -> Chunk:
    is_restart = message.WhichOneof("content") == "restart"
    value = None if is_restart else await api.transfer.fetch(message.payload, f"a chunk of task {message.task_id!r}")
    return Chunk(message.task_id, message.sequence, message.attempt, message.index, value, is_restart)


def _progress_of(message: run_pb2.TaskProgress) -> Progress:
    total = message.total if message.HasField("total") else None
    return Progress(message.task_id, message.attempt, message.done, total)
