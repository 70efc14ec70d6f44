"""Owns the handle of a run that its caller holds open, for asyncio.

Rule: what the stream tells is asked for nowhere else.
"""

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Never, Self

from lattice.v1 import cluster_pb2, run_pb2, workflow_pb2

from lattice_client import errors
from lattice_client.graph.outputs import UNSET, TaskOutput
from lattice_client.graph.task import TaskDefinition
from lattice_client.graph.workflow import Graph, LatticeTask
from lattice_client.runs.decoding import opened
from lattice_client.runs.open_stream import Hold
from lattice_client.runs.questions import OnQuestion, Question, serve, serve_awaited
from lattice_client.runs.run import AsyncRun, task_id_of
from lattice_client.transport.channel import Steps

if TYPE_CHECKING:
    from lattice_client.client import AsyncLatticeClient

Handled = TaskDefinition[..., Any] | Callable[..., Any]


class Inquiries:
    """The questions of one run that wait for an answer here."""

    def __init__(self, hold: Hold, limit_bytes: int) -> None:
        self._hold = hold
        self._limit_bytes = limit_bytes
        self._waiting: dict[str, Question] = {}
        self._untaken: deque[Question] = deque()
        hold.on_question, hold.on_withdrawal = self._ask, self._withdraw

    def _ask(self, message: workflow_pb2.Question) -> None:
        question = Question(message, self._limit_bytes, self._answer)
        self._waiting[question.question_id] = question
        self._untaken.append(question)

    def _withdraw(self, question_id: str) -> None:
        if (question := self._waiting.pop(question_id, None)) is not None:
            question.is_withdrawn = True

    def _answer(self, answer: workflow_pb2.QuestionAnswer) -> bool:
        self._waiting.pop(answer.question_id, None)
        return self._hold.answer(answer)

    @property
    def has_next(self) -> bool:
        """Whether a question was not taken yet."""
        return bool(self._untaken)

    def take(self) -> Question | None:
        """Return the oldest question that was not taken yet and still needs an answer."""
        while self._untaken:
            try:
                question = self._untaken.popleft()
            except IndexError:  # another thread took it
                return None
            if not question.is_withdrawn:
                return question
        return None


class Answering:
    """Answers the questions of one run by a handler, each in a task of its own on the running loop."""

    def __init__(self, inquiries: Inquiries, handler: OnQuestion) -> None:
        self._inquiries = inquiries
        self._handler = handler
        self._tasks: dict[Question, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Begin to answer all questions that were not taken yet; stop answering those that were withdrawn."""
        while (question := self._inquiries.take()) is not None:
            task = asyncio.get_running_loop().create_task(self._serve(question))
            self._tasks[question] = task
        for question, task in list(self._tasks.items()):
            if task.done():
                del self._tasks[question]
            elif question.is_withdrawn:
                task.cancel()

    async def _serve(self, question: Question) -> None:
        found = serve(question, self._handler)
        if found is not None:
            await serve_awaited(question, found)


class AsyncOpenRun(AsyncRun):
    """A run that goes on while it is held open: tasks are added as it goes, and may ask the caller questions.

    Use it as a context manager. At the end of the block the run is closed and its end awaited; a block that raises
    cancels the run. A failed task that `output` was not asked for is raised at the end.
    """

    tasks: Graph[None]
    hold: Hold
    inquiries: Inquiries
    steps: Steps
    # What serves questions while the caller waits, where nothing else does.
    handler: OnQuestion | None
    # The tasks that were added here, and those of which the caller was told how they ended.
    _known: set[str]
    _told: set[str]

    @classmethod
    async def opened(
        cls,
        client: "AsyncLatticeClient",
        hold: Hold,
        limits: cluster_pb2.Limits,
        on_question: OnQuestion | None,
        steps: Callable[[Callable[[], Any]], Steps],
        *,
        is_served_apart: bool,
    ) -> Self:
        """Return the run that a stream holds, once it does. Raises RequestError."""
        inquiries = Inquiries(hold, limits.question_bytes)
        await hold.open()
        answering = Answering(inquiries, on_question) if on_question is not None and is_served_apart else None

        async def step() -> bool:
            goes_on = await hold.step()
            if answering is not None:
                answering.start()
            return goes_on

        run = cls.of(hold.run_id, client)
        run.tasks, run.hold, run.inquiries, run.steps = Graph(None), hold, inquiries, steps(step)
        run.handler = None if is_served_apart else on_question
        run.note_graph(run.tasks)
        run._known, run._told = set(), set()
        weakref.finalize(run, _let_go, hold, run.steps).atexit = False
        return run

    async def add(
        self,
        task_func: Handled,
        inputs: Mapping[str, Any] | None = None,
        task_name: str | None = None,
        *,
        task_id: str | None = None,
        when: TaskOutput | None = None,
        unless: TaskOutput | None = None,
        equals: Any = UNSET,
        **misplaced: Never,
    ) -> LatticeTask:
        """Add a task, which starts as soon as its inputs are there; see `LatticeWorkflow.add_task`.

        It may be wired to every task of the run, also to one that has ended. Raises TaskDefinitionError, RequestError.
        """
        added = self.tasks.add_task(
            task_func, inputs, task_name, task_id=task_id, when=when, unless=unless, equals=equals, **misplaced
        )
        return await self._sent(added)

    async def map(
        self,
        task_func: Handled,
        over: TaskOutput | Mapping[str, TaskOutput],
        inputs: Mapping[str, Any] | None = None,
        task_name: str | None = None,
        *,
        task_id: str | None = None,
        **misplaced: Never,
    ) -> LatticeTask:
        """Add a task for each item of a list that a task of the run is still to make; see `LatticeWorkflow.map`."""
        return await self._sent(self.tasks.map(task_func, over, inputs, task_name, task_id=task_id, **misplaced))

    async def _sent(self, added: LatticeTask) -> LatticeTask:
        try:
            await self.add_tasks([added])
        except BaseException:
            self.tasks.tasks.pop(added.task_id, None)
            raise
        return added

    async def add_tasks(self, tasks: Sequence[LatticeTask], expected_revision: int | None = None) -> int:
        """Add tasks of a workflow, all in one message; see `AsyncRun.add_tasks`."""
        starter = self.client.starter
        revision = await starter.add_by(self._add, self, tasks, self.scope(tasks), expected_revision)
        self.note_added(tasks)
        self._known.update(task.task_id for task in tasks)
        return revision

    async def _add(self, request: workflow_pb2.AddTasksRequest) -> workflow_pb2.AddTasksResponse:
        self.hold.add(request)
        await self.steps.until(lambda: request.request_id in self.hold.results)
        result = self.hold.results.pop(request.request_id, None)
        if result is None:
            raise errors.PreconditionError(f"run {str(self)!r} has ended; nothing can be added to it", "RUN_ENDED")
        if result.HasField("refused"):
            raise errors.from_refusal(result.refused)
        return result.added

    async def fetched_output(self, task: LatticeTask | TaskOutput | str, timeout: float | None = None) -> Any:
        """As `output`, for `opened`."""
        task_id = task_id_of(task)
        async with self.client.reader.limited(self, timeout, task_id):
            if task_id not in self._known and not self.hold.has_ended(task_id):
                await self.client.reader.find_task(self, task_id)
            await self._until(lambda: self.hold.has_ended(task_id))
            self._told.add(task_id)
            if (ended := self.hold.end_of(task_id)) is not None:
                return await self.client.reader.output_in(ended, self, task)
            return await self.client.reader.output_of(self, task)

    async def fetched_result(self, timeout: float | None = None, partial: bool = False) -> Any:
        """Close the run and wait for its end; return what `opened` turns into its result, or into its error."""
        await self.close(timeout)
        return await super().fetched_result(timeout, partial)

    async def as_completed(self, tasks: Iterable[LatticeTask]) -> AsyncIterator[LatticeTask]:
        """Yield tasks of the run as they end, however they end."""
        left = list(tasks)
        while left:
            await self._until(partial(self.hold.has_any_ended, [task.task_id for task in left]))
            ended = [task for task in left if self.hold.has_ended(task.task_id)] or left
            left = [task for task in left if task not in ended]
            for task in ended:
                yield task

    async def questions(self) -> AsyncIterator[Question]:
        """Yield the questions of tasks until the run has ended, for a run that was opened without `on_question`."""
        while True:
            await self.steps.until(lambda: self.inquiries.has_next)
            if (question := self.inquiries.take()) is not None:
                yield question
            elif self.hold.ended is not None:
                return

    async def close(self, timeout: float | None = None) -> run_pb2.Run:
        """Close the run and wait for its end: no more tasks will come. Raises TimeoutError."""
        async with self.client.reader.limited(self, timeout):
            self.hold.close()
            await self._until(lambda: self.hold.ended is not None)
        assert self.hold.ended is not None, "there are no more steps only once it has ended"
        return self.hold.ended

    async def _until(self, is_ready: Callable[[], bool]) -> None:
        """Wait until something holds, or the run has ended; answer questions meanwhile where nothing else does."""
        handler = self.handler
        if handler is None:
            await self.steps.until(is_ready)
            return
        while not is_ready():
            await self.steps.until(lambda: is_ready() or self.inquiries.has_next)
            if (question := self.inquiries.take()) is not None:
                if serve(question, handler) is not None:
                    raise errors.TaskDefinitionError("on_question must not return an awaitable here")
            elif self.hold.ended is not None:
                return

    async def unseen_error(self) -> errors.RunError | None:
        """Return the error of a run that has ended, unless `output` was asked for the task that failed."""
        run = self.hold.ended
        if run is None or run.failure.task_id in self._told:
            return None
        return await self.client.reader.error_of(run)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None:
            await self.give_up(error)
            return
        await self.close()
        opened(await self.unseen_error())

    async def give_up(self, error: BaseException) -> None:
        """Cancel the run because of an error of its caller; hold it no more."""
        try:
            await self.cancel(f"the caller that held it open raised {type(error).__name__}")
        finally:
            _let_go(self.hold, self.steps)


def _let_go(hold: Hold, steps: Steps) -> None:
    steps.stop()
    hold.abandon()


class Opening:
    """A run about to be opened: `async with client.open_run() as run`, or `run = await client.open_run()`."""

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
