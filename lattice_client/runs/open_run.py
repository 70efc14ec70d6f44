"""Owns the handle of an open run for asyncio. Rule: facts that its stream reported are not read by another call."""

import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Never, Self

from lattice.v1 import run_pb2, workflow_pb2

from lattice_client import errors
from lattice_client.graph.deferred import UNSET
from lattice_client.graph.definition import TaskDefinition
from lattice_client.graph.nodes import LatticeTask, tasks_in
from lattice_client.graph.outputs import TaskOutput
from lattice_client.graph.relays import relay_of
from lattice_client.graph.settings import TaskRunSettings, disconnect_grace_s
from lattice_client.graph.workflow import Graph
from lattice_client.runs.answering import AnsweringTasks, Questions, answer_by
from lattice_client.runs.api import RunApi
from lattice_client.runs.decoding import decoded
from lattice_client.runs.ids import task_id_of
from lattice_client.runs.open_run_stream import OpenRunStream
from lattice_client.runs.questions import OnQuestion, Question
from lattice_client.runs.run import AsyncRun
from lattice_client.runs.tracebacks import shorten
from lattice_client.transport import statuses
from lattice_client.transport.channel import Steps

TaskFunction = TaskDefinition[..., Any] | Callable[..., Any]


@dataclass(frozen=True, slots=True)
class OpenRunRequest:
    """The arguments of `open_run`. `graph` has its name and failure policy, and no tasks."""

    graph: Graph[None]
    on_question: OnQuestion | None
    run_id: str
    settings: TaskRunSettings


@shorten
class AsyncOpenRun(AsyncRun):
    """A run that accepts tasks while its stream is open, and whose tasks may ask the caller questions.

    Use it as a context manager. At the end of the block the run is closed, and the block waits for its end. A block
    that raises cancels the run. The error of a failed task is raised at the end, unless `output` raised it before.
    """

    tasks: Graph[None]
    caller_stream: OpenRunStream
    open_questions: Questions
    steps: Steps
    # Answers questions while the caller waits; None when asyncio tasks answer them.
    handler: OnQuestion | None
    # The ids of the tasks that this client added, and of those whose end it returned to the caller.
    _added_ids: set[str]
    _reported: set[str]

    @classmethod
    async def open(cls, api: RunApi, request: OpenRunRequest, *, is_answered_by_tasks: bool) -> Self:
        """Open a run; see `AsyncLatticeClient.open_run`. Raises TaskDefinitionError, RequestError.

        Its questions are answered by asyncio tasks, or else by the caller while it waits.
        """
        opening = await api.starter.opening(request.graph, request.run_id, request.settings)
        limits = await api.channel.limits()
        grace_s = disconnect_grace_s(request.settings.get("cancel_on_disconnect", False))
        grace_s = grace_s or limits.open_run_grace.ToNanoseconds() / 1e9
        stream = OpenRunStream(api.channel, workflow_pb2.OpenRunOpening(run=opening), grace_s)
        questions = Questions(stream, limits.question_bytes, api.transfer.trust_pickles)
        await stream.open()
        handler = request.on_question
        answering = AnsweringTasks(questions, handler) if handler is not None and is_answered_by_tasks else None

        async def step() -> bool:
            may_continue = await stream.step()
            if answering is not None:
                answering.start()
            return may_continue

        run = cls.of(stream.run_id, api)
        run.tasks, run.caller_stream, run.open_questions = Graph(None), stream, questions
        run.steps = api.channel.steps(step)
        run.handler = None if is_answered_by_tasks else handler
        run.note_graph(run.tasks)
        run._added_ids, run._reported = set(), set()
        # The steps have the error that ended them, whose traceback has the frames of the callers that refer to the run.
        weakref.finalize(run, _release, stream, weakref.ref(run.steps)).atexit = False
        return run

    async def add(
        self,
        task_func: TaskFunction,
        inputs: Mapping[str, Any] | None = None,
        task_name: str | None = None,
        *,
        task_id: str | None = None,
        when: TaskOutput | None = None,
        unless: TaskOutput | None = None,
        equals: Any = UNSET,
        **misplaced: Never,
    ) -> LatticeTask:
        """Add a task, which starts as soon as its inputs exist; see `LatticeWorkflow.add_task`.

        It can be wired to every task of the run, also to an ended one. Raises TaskDefinitionError, RequestError.
        """
        added = self.tasks.add_task(
            task_func, inputs, task_name, task_id=task_id, when=when, unless=unless, equals=equals, **misplaced
        )
        return await self._sent(added)

    async def map(
        self,
        task_func: TaskFunction,
        over: TaskOutput | Mapping[str, TaskOutput],
        inputs: Mapping[str, Any] | None = None,
        task_name: str | None = None,
        *,
        task_id: str | None = None,
        **misplaced: Never,
    ) -> LatticeTask:
        """Add a task that runs once for each item of a list that a task returns; see `LatticeWorkflow.map`.

        The source was sent without a request for its items, so a further task, `items`, returns them.
        """
        mapped = self.tasks.map(task_func, over, inputs, task_name, task_id=task_id, **misplaced)
        source: TaskOutput = mapped.inputs[mapped.over]
        if isinstance(source.owner, LatticeTask) and source.owner.over:  # Its items came one by one.
            return await self._sent(mapped)
        relay = self.tasks.add_task(relay_of(mapped.definition), {"values": source}, f"items of {source.task_id}")
        mapped.inputs = {**mapped.inputs, mapped.over: relay.output}
        return await self._sent(mapped, relay)

    async def _sent(self, added: LatticeTask, *before: LatticeTask) -> LatticeTask:
        try:
            await self.add_tasks([*before, added])
        except BaseException:
            for sent in (*before, added):
                self.tasks.tasks.pop(sent.task_id, None)
            raise
        return added

    async def add_tasks(self, tasks: Sequence[LatticeTask], expected_revision: int | None = None) -> int:
        """Add tasks of a workflow, all in one message; see `AsyncRun.add_tasks`."""
        tasks = tasks_in(tasks)
        revision = await self.api.starter.add_by(self._add, self, tasks, self.scope(tasks), expected_revision)
        self.note_added(tasks)
        self._added_ids.update(task.task_id for task in tasks)
        return revision

    async def _add(self, request: workflow_pb2.AddTasksRequest) -> workflow_pb2.AddTasksResponse:
        self.caller_stream.add(request)
        await self.steps.until(lambda: request.request_id in self.caller_stream.results)
        result = self.caller_stream.results.pop(request.request_id, None)
        if result is None:
            raise errors.PreconditionError(f"run {str(self)!r} has ended; nothing can be added to it", "RUN_ENDED")
        if result.HasField("refused"):
            raise statuses.from_refusal(result.refused)
        return result.added

    async def fetched_output(self, task: LatticeTask | TaskOutput | str, timeout: float | None = None) -> Any:
        """Wait for the end of a task; return its fetched output, or its error, for `decoded`."""
        task_id = task_id_of(task)
        async with self.api.reader.limited(self, timeout, task_id):
            if task_id not in self._added_ids and task_id not in self.caller_stream.task_ends:
                await self.api.reader.find_task(self, task_id)
            await self._until(lambda: task_id in self.caller_stream.task_ends)
            self._reported.add(task_id)
            if (ended := self.caller_stream.task_ends.find(self, task_id)) is not None:
                return await self.api.reader.output_in(ended, self, task)
            return await self.api.reader.output_of(self, task)

    @property
    def ends_with_caller(self) -> bool:
        """Whether the server cancels the run when this process ends."""
        return True

    async def fetched_result(
        self, timeout: float | None = None, partial: bool = False, grace_s: float | None = None
    ) -> Any:
        """Close the run and wait for its end; return the fetched result, or the error, for `decoded`."""
        await self.close(timeout)
        return await super().fetched_result(timeout, partial, grace_s)

    async def as_completed(self, tasks: Iterable[LatticeTask]) -> AsyncIterator[LatticeTask]:
        """Yield tasks of the run in the order in which they end, including failed ones."""
        left = list(tasks)
        while left:
            await self._until(partial(self.caller_stream.task_ends.has_any, [task.task_id for task in left]))
            ended = [task for task in left if task.task_id in self.caller_stream.task_ends] or left
            left = [task for task in left if task not in ended]
            for task in ended:
                yield task

    async def questions(self) -> AsyncIterator[Question]:
        """Yield the questions of tasks until the end of a run that was opened without `on_question`."""
        while True:
            await self.steps.until(lambda: self.open_questions.has_next)
            if (question := self.open_questions.take()) is not None:
                yield question
            elif self.caller_stream.ended is not None:
                return

    async def close(self, timeout: float | None = None) -> run_pb2.Run:
        """Close the run, which then accepts no more tasks, and wait for its end. Raises TimeoutError."""
        async with self.api.reader.limited(self, timeout):
            self.caller_stream.close()
            await self._until(lambda: self.caller_stream.ended is not None)
        assert self.caller_stream.ended is not None, "the last step is the end of the run"
        return self.caller_stream.ended

    async def _until(self, is_ready: Callable[[], bool]) -> None:
        """Wait until a condition is true or the run has ended; answer questions meanwhile if there is a handler."""
        handler = self.handler
        if handler is None:
            await self.steps.until(is_ready)
            return
        while not is_ready():
            await self.steps.until(lambda: is_ready() or self.open_questions.has_next)
            if (question := self.open_questions.take()) is not None:
                if answer_by(handler, question) is not None:
                    raise errors.TaskDefinitionError("on_question must be a plain function; coroutines need client.aio")
            elif self.caller_stream.ended is not None:
                return

    async def unreported_error(self) -> errors.RunError | None:
        """Return the error of the ended run, unless `output` raised the error of the failed task before."""
        run = self.caller_stream.ended
        if run is None or run.failure.task_id in self._reported:
            return None
        return await self.api.reader.error_of(run)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None:
            await self.cancel_for(error)
            return
        await self.close()
        decoded(await self.unreported_error())

    async def cancel_for(self, error: BaseException) -> None:
        """Cancel the run because of an exception of its caller, and close its stream."""
        try:
            await self.cancel(f"the caller of the open run raised {type(error).__name__}")
        finally:
            _release(self.caller_stream, weakref.ref(self.steps))


def _release(stream: OpenRunStream, steps: "weakref.ref[Steps]") -> None:
    # Steps that are still made are kept by their task, or by the threads that wait for them.
    if (found := steps()) is not None:
        found.stop()
    stream.release()


class Opening:
    """A run that is opened by `async with client.open_run() as run`, or by `run = await client.open_run()`."""

    def __init__(self, open_: Callable[[], Coroutine[Any, Any, AsyncOpenRun]]) -> None:
        self._open = open_
        self._run: AsyncOpenRun | None = None

    def __await__(self) -> Generator[Any, None, AsyncOpenRun]:
        return self._open().__await__()

    async def __aenter__(self) -> AsyncOpenRun:
        self._run = await self._open()
        return await self._run.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._run is not None, "the block was entered"
        await self._run.__aexit__(kind, error, trace)
