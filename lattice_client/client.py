"""Owns what can be asked of a server, for asyncio. The synchronous client in `sync.py` is a facade of this one.

Rule: a graph is one RPC; a watch that breaks goes on after the last event it saw. Values are fetched here, and decoded
by the methods that callers use, in their own thread; see `opening`.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import Any, Never, NoReturn, Self, TypeVar, Unpack
from uuid import uuid4

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from lattice.v1 import payload_pb2, results_pb2, run_pb2, task_pb2, worker_pb2, workflow_pb2

from lattice_client import brevity, convert, errors
from lattice_client.brevity import Brevity, Kind
from lattice_client.channel import Channel
from lattice_client.convert import RunEvent
from lattice_client.following import OnLoss, Reconnection, limited
from lattice_client.inputs import Upload
from lattice_client.opening import Fetched, opened
from lattice_client.outputs import Scope, TaskOutput
from lattice_client.run import Answer, AsyncRun, Outcome, RunId, abandon, task_id_of
from lattice_client.security import SecurityOptions
from lattice_client.settings import RunSettings, check_settings
from lattice_client.workflow import Graph, LatticeTask, single

T = TypeVar("T")

CHUNK_BYTES = 1024 * 1024
WAIT_S = 60.0
# How long a call goes on asking a server that has as much work as it takes.
ADMISSION_TIMEOUT_S = 600.0
# Runs beyond these are asked for their result by a call of their own.
MAX_OPEN_CALLS = 64
TERMINAL = frozenset({run_pb2.RUN_STATE_SUCCEEDED, run_pb2.RUN_STATE_FAILED, run_pb2.RUN_STATE_CANCELLED})
ENDED = frozenset(
    {
        run_pb2.TASK_STATE_SUCCEEDED,
        run_pb2.TASK_STATE_FAILED,
        run_pb2.TASK_STATE_CANCELLED,
        run_pb2.TASK_STATE_SKIPPED,
    }
)
# What gRPC says of an upload whose call the server ended while it was written to; the server's own words are lost then.
LOST_STATUS = "Internal error from Core"
UPLOAD_TRIES = 5


class AsyncLatticeWorkflow(Graph["AsyncLatticeClient"]):
    """A workflow being written, for asyncio."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name or self.workflow_id!r}, tasks: {len(self.tasks)}>"

    async def run(self, run_id: str = "", **settings: Unpack[RunSettings]) -> AsyncRun:
        """Send the whole graph and start a run; see `RunSettings`. Raises TaskDefinitionError, RequestError."""
        return await self.client.run(self, run_id, **settings)

    async def get_results(
        self, run_id: str, verbose: bool = True, timeout: float | None = None
    ) -> list[dict[str, Any]]:
        """Follow a run to its end and return its messages, printing them when `verbose`.

        Messages are `{"type": ..., "data": {...}}`, type one of `start_task`, `finish_task`, `task_exception` and,
        last, `finish_workflow`. Raises TimeoutError when the run takes longer than `timeout` seconds.
        """
        messages = []
        async with limited(run_id, timeout):
            async for message in self.messages(run_id):
                messages.append(message)
                if verbose:
                    print(message)
        return messages

    async def messages(self, run_id: str) -> AsyncIterator[dict[str, Any]]:
        """Yield the messages `get_results` returns, as they come."""
        async for event in self.client.events(run_id):
            message = convert.message_of(event, self.workflow_id, run_id)
            if message is not None:
                yield message


class AsyncLatticeClient:
    """A connection to a server, for any number of event loops. Use it as a context manager or with `close`.

    `tenant` names the caller that fair share counts; `admission_timeout` is for how many seconds a run that finds the
    server full is offered again before `ResourceExhaustedError` is raised. The rest makes the connection safe; see
    `SecurityOptions`. Connects with the first call. Raises TargetError when the target is no address, SecurityError
    when the connection would not be safe.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        tenant: str = "",
        admission_timeout: float = ADMISSION_TIMEOUT_S,
        **security: Unpack[SecurityOptions],
    ) -> None:
        self._rpc = Channel(target, **security)
        self.target = self._rpc.target
        self._tenant = tenant
        self._admission_timeout_s = admission_timeout
        self._open: set[Outcome] = set()
        self._known_code: set[str] = set()
        self._brevity = Brevity()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.target}{', closed' if self._rpc.is_closed else ''}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self!r} cannot be pickled: a task that needs a client makes one of its own")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; runs go on."""
        for outcome in list(self._open):
            abandon(outcome)
        await self._rpc.close()

    def create_workflow(self, name: str = "", failure_policy: str = "fail_fast") -> AsyncLatticeWorkflow:
        """Return an empty workflow; nothing is sent. See `LatticeClient.create_workflow`."""
        return AsyncLatticeWorkflow(self, name, failure_policy=failure_policy)

    def get_workflow(self, workflow_id: str) -> AsyncLatticeWorkflow:
        """Return a workflow stored on the server, to be run by its id."""
        return AsyncLatticeWorkflow(self, workflow_id=workflow_id)

    async def get_run(self, run_id: str) -> AsyncRun:
        """Return a run to follow. Raises NotFoundError."""
        await self.describe_run(run_id)
        return AsyncRun.of(run_id, self)

    async def get_ray_head_port(self) -> int:
        """Return the port of the server's Ray head; zero without Ray."""
        return int((await self.cluster()).ray_address.rpartition(":")[2] or 0)

    # Starting.

    async def run(self, graph: Graph[Any], run_id: str = "", **settings: Unpack[RunSettings]) -> AsyncRun:
        """Send the whole graph and start a run.

        Args:
            graph: the workflow.
            run_id: names the run; the same id with the same content is the same run.
            settings: see `RunSettings`.

        Raises:
            TaskDefinitionError: a setting, a task or its wiring is wrong; nothing was sent.
            RequestError: the server refused it.
        """
        return await self.submit(await self.request_of(graph, self.upload, run_id, **settings), graph)

    async def request_of(
        self, graph: Graph[Any], upload: Upload, run_id: str = "", **settings: Unpack[RunSettings]
    ) -> workflow_pb2.RunWorkflowRequest:
        """Return what `run` sends, without the code. Waits for nothing but `upload`."""
        check_settings(settings)
        labels, priority, timeout = settings.get("labels"), settings.get("priority", 0), settings.get("timeout")
        labels = {**({"tenant": self._tenant} if self._tenant else {}), **(labels or {})}
        # An id of our own makes the call safe to repeat when its answer is lost.
        run_id = run_id or f"run-{uuid4().hex}"
        convert.pack_code(graph.tasks.values())
        with _building():
            request = _made(workflow_pb2.RunWorkflowRequest, run_id=run_id, labels=labels, priority=priority)
            if timeout is not None:
                request.timeout.CopyFrom(_duration(timeout))
            if graph.workflow_id and not graph.tasks:
                request.workflow_id = graph.workflow_id
            else:
                # Once, however often it is offered: large inputs would be uploaded each time.
                request.workflow.CopyFrom(await convert.tasks_of(graph.tasks.values(), upload, graph.scope))
                request.workflow.display_name = graph.name
                request.workflow.failure_policy = convert.FAILURE_POLICIES[graph.failure_policy]
        return request

    async def submit(self, request: workflow_pb2.RunWorkflowRequest, graph: Graph[Any]) -> AsyncRun:
        """Start the run of a request, again while the server has as much work as it takes. Raises RequestError."""
        run = await self._offer(lambda: self._start(request, graph))
        run.note_graph(graph)
        return run

    async def run_task(self, task: Any, inputs: Mapping[str, Any] | None = None, **misplaced: Never) -> dict[str, Any]:
        """Run one task as a run of its own and return its outputs.

        Raises TaskDefinitionError, TaskFailedError, RequestError.
        """
        added = single(task, inputs, misplaced)
        found: dict[str, Any] = opened(await self.submit_task(await self.task_request_of(added, self.upload), added))
        return found

    async def task_request_of(self, task: LatticeTask, upload: Upload) -> task_pb2.RunTaskRequest:
        """Return what `run_task` sends, without the code. Waits for nothing but `upload`."""
        labels = {"tenant": self._tenant} if self._tenant else {}
        convert.pack_code([task])
        with _building():
            request = task_pb2.RunTaskRequest(run_id=f"run-{uuid4().hex}", wait=_duration(WAIT_S), labels=labels)
            request.task.CopyFrom(await convert.task_of(task, "", upload))
        return request

    async def submit_task(self, request: task_pb2.RunTaskRequest, task: LatticeTask) -> Any:
        """Run the task of a request to its end; return what `opened` turns into its outputs, or into its error."""
        function, bundle = task.definition.packed

        async def call() -> task_pb2.RunTaskResponse:
            if function.digest in self._known_code:
                request.function.digest = function.digest
            else:
                request.function.CopyFrom(function)
                if bundle is not None:
                    request.bundle.CopyFrom(bundle)
            return await self._rpc.call(self._rpc.tasks.RunTask(request))

        response = await self._offer(call)
        self._known_code.add(function.digest)
        if response.run.state == run_pb2.RUN_STATE_SUCCEEDED:
            outputs = convert.ordered(response.task.outputs, task.definition.outputs)
            return {name: await self.fetch(payload) for name, payload in outputs.items()}
        return await self.result_in(await self.ended(response.run.run_id), declared=convert.declared_by([task]))

    async def add_tasks(self, run_id: str, tasks: Sequence[LatticeTask], expected_revision: int = 0) -> int:
        """Add tasks to a run that goes on; return its revision. See `AsyncRun.add_tasks`."""
        ids = {task.task_id for task in tasks}
        scope = run_id.scope(tasks) if isinstance(run_id, AsyncRun) else Scope(lambda output: True, ids)
        spec = await self.spec_of(tasks, self.upload, scope)
        return await self.submit_tasks(run_id, spec, tasks, expected_revision)

    async def spec_of(self, tasks: Sequence[LatticeTask], upload: Upload, scope: Scope) -> workflow_pb2.WorkflowSpec:
        """Return what `add_tasks` sends, without the code. Waits for nothing but `upload`."""
        convert.pack_code(tasks)
        with _building():
            return await convert.tasks_of(tasks, upload, scope)

    async def submit_tasks(
        self, run_id: str, spec: workflow_pb2.WorkflowSpec, tasks: Sequence[LatticeTask], expected_revision: int
    ) -> int:
        """Add the tasks of a spec to a run; see `add_tasks`."""

        async def call() -> int:
            convert.fill_code(spec, tasks, self._known_code)
            request = _made(
                workflow_pb2.AddTasksRequest,
                run_id=run_id,
                tasks=spec.tasks,
                functions=spec.functions,
                bundles=spec.bundles,
                expected_revision=expected_revision,
            )
            response = await self._rpc.call(self._rpc.workflows.AddTasks(request))
            self._known_code.update(function.digest for function in spec.functions.values())
            return response.revision

        return await self._offer(call)

    async def _offer(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call that brings work: again with its code when the server has forgotten some, again later when the
        server has as much as it takes."""
        deadline = asyncio.get_running_loop().time() + self._admission_timeout_s
        while True:
            try:
                return await call()
            except errors.PreconditionError as error:
                if error.reason != "FUNCTION_MISSING" or not self._known_code:
                    raise
                self._known_code.clear()
            except errors.ResourceExhaustedError as error:
                if error.retry_after_s is None:
                    raise
                # Spread, so that all who were refused together do not come back together.
                wait_s = error.retry_after_s * random.uniform(0.5, 1.5)
                if asyncio.get_running_loop().time() + wait_s > deadline:
                    raise
                await asyncio.sleep(wait_s)

    async def _start(self, request: workflow_pb2.RunWorkflowRequest, graph: Graph[Any]) -> AsyncRun:
        if request.HasField("workflow"):
            convert.fill_code(request.workflow, graph.tasks.values(), self._known_code)
        digests = frozenset(function.digest for function in request.workflow.functions.values())
        kind = (digests, len(graph.tasks))
        is_brief = self._brevity.is_brief(kind)
        if is_brief or len(self._open) >= MAX_OPEN_CALLS:
            if is_brief:
                request.wait.CopyFrom(_duration(brevity.WAIT_S))
            answer = await self._rpc.call(self._rpc.workflows.RunWorkflow(request))
            has_ended = answer.run.state in TERMINAL
            if has_ended or is_brief:
                self._brevity.learn(kind, answer.run)
            run = AsyncRun.of(answer.run.run_id, self, answer=answer if has_ended else None, kind=kind)
        else:
            first, outcome = await self._rpc.call(self._execute(request))
            run = AsyncRun.of(first.run_id, self, outcome, kind=kind)
        self._known_code.update(digests)
        return run

    async def _execute(self, request: workflow_pb2.RunWorkflowRequest) -> tuple[run_pb2.Run, Outcome]:
        """Start a run by a call that ends with the run and brings its result."""
        execute = workflow_pb2.ExecuteWorkflowRequest(run=request, result_only=True)
        call = self._rpc.workflows.ExecuteWorkflow(execute)
        first = await call.read()
        assert isinstance(first, workflow_pb2.ExecuteWorkflowResponse), "the server answers before it ends the call"
        outcome = asyncio.create_task(_last(call))
        self._open.add(outcome)
        outcome.add_done_callback(self._open.discard)
        return first.run, outcome

    # Following.

    async def ended(self, run_id: str, outcome: Outcome | None = None, kind: Kind | None = None) -> Answer:
        """Wait for a run's end; return what the server says of it. Raises RequestError."""
        answer: Answer | None = None
        if outcome is not None and outcome.get_loop() is asyncio.get_running_loop():
            await asyncio.wait([outcome])
            answer = None if outcome.cancelled() else outcome.result()
        if answer is None:
            answer = await self._get_result(run_id)
        if kind is not None:
            self._brevity.learn(kind, answer.run)
        return answer

    async def result_in(
        self, answer: Answer, is_partial: bool = False, declared: convert.Declared = MappingProxyType({})
    ) -> Any:
        """Return what `opened` turns into the outputs of a run that ended, or into its error; see `AsyncRun.result`."""
        if answer.run.state != run_pb2.RUN_STATE_SUCCEEDED and not is_partial:
            return await self.error_of(answer.run)
        return await convert.result_of(answer.final_tasks, self.fetch, declared)

    async def error_of(self, run: run_pb2.Run) -> errors.RunError | None:
        """Return the error of a run that ended otherwise than well, with the name of the task that failed if it can be
        had; None of one that ended well."""
        request, name = task_pb2.GetTaskRequest(run_id=run.run_id, task_id=run.failure.task_id), ""
        if request.task_id:
            with suppress(errors.LatticeError):
                name = (await self._rpc.call(self._rpc.tasks.GetTask(request))).task.display_name
        return convert.error_of(run, name)

    async def output_of(self, run_id: str, task: LatticeTask | TaskOutput | str) -> Any:
        """Wait for a task's end; return what `opened` turns into its output, or its error; see `AsyncRun.output`."""
        task_id = task_id_of(task)
        request = _made(task_pb2.GetTaskRequest, run_id=run_id, task_id=task_id, wait=_duration(WAIT_S))
        found = await self._until(run_id, lambda: self._rpc.tasks.GetTask(request), lambda r: r.task.state in ENDED)
        if (failed := convert.lack_of(found.task)) is not None:
            return failed
        items = await self.list_tasks(run_id) if found.task.item_count else []
        items = [item for item in items if item.parent_task_id == task_id]
        owner = task.owner if isinstance(task, TaskOutput) else task
        known = convert.declared_by([owner] if isinstance(owner, LatticeTask) else ())
        declared = known.get(task_id) or _declared(run_id).get(task_id, ())
        outputs = await convert.outputs_of(found.task, items, self.fetch, declared) or {}
        if isinstance(task, TaskOutput) and task.output not in outputs:
            text = f"task {task_id!r} of run {str(run_id)!r} has no output {task.output!r}"
            return errors.RunError(run_id, f"{text}; its outputs: {', '.join(map(repr, outputs)) or 'none'}")
        return convert.value_of(outputs, task)

    async def _get_result(self, run_id: str) -> results_pb2.GetResultResponse:
        request = _made(results_pb2.GetResultRequest, run_id=run_id, wait=_duration(WAIT_S))
        return await self._until(
            run_id, lambda: self._rpc.results.GetResult(request), lambda r: r.run.state in TERMINAL
        )

    async def _until(self, run_id: str, call: Callable[[], Awaitable[T]], is_over: Callable[[T], bool]) -> T:
        """Make a call that waits, again until its response is the one waited for. Raises RequestError."""
        breaks = Reconnection(self._rpc, run_id)
        while True:
            try:
                with self._rpc.closing():
                    response = await call()
            except grpc.aio.AioRpcError as error:
                await breaks.wait(error)
                continue
            breaks.heard()
            if is_over(response):
                return response

    async def events(self, run_id: str, after: int = 0) -> AsyncIterator[RunEvent]:
        """Yield a run's events after number `after`, each once, to its end.

        Raises:
            NotFoundError: there is no such run.
            UnavailableError: the server could not be reached for `following.RECONNECT_S`.
        """
        async for event in self.fetched_events(run_id, after):
            yield opened(event)

    async def fetched_events(
        self, run_id: str, after: int = 0, fetch: convert.Decode | None = None, on_loss: OnLoss | None = None
    ) -> AsyncIterator[RunEvent]:
        """As `events`, with outputs as `fetch` returns them; by default for `opened`. `on_loss` is told of a break."""
        breaks = Reconnection(self._rpc, run_id, on_loss)
        while True:
            request = _made(results_pb2.WatchRunRequest, run_id=run_id, after_sequence=after)
            try:
                with self._rpc.closing():
                    async for response in self._rpc.results.WatchRun(request):
                        breaks.heard()
                        for message in response.events:
                            yield await convert.event_of(message, fetch or self.fetch, _declared(run_id))
                        after = response.sequence
                        if response.complete:
                            return
            except grpc.aio.AioRpcError as error:
                await breaks.wait(error)

    async def fetch(self, payload: payload_pb2.Payload) -> Fetched:
        """Return a payload's encoding; a large one is downloaded."""
        match payload.WhichOneof("content"):
            case "json":
                return Fetched(payload.media_type, payload.json.encode())
            case "data":
                return Fetched(payload.media_type, payload.data)
            case _:
                data = await self._rpc.call(self._download(payload.artifact.artifact_id))
                return Fetched(payload.media_type, data)

    # Looking, and ending.

    async def describe_run(self, run_id: str) -> run_pb2.Run:
        """Return a run as it is now. Raises NotFoundError."""
        request = _made(workflow_pb2.GetRunRequest, run_id=run_id)
        return (await self._rpc.call(self._rpc.workflows.GetRun(request))).run

    async def list_runs(self, limit: int = 100) -> list[run_pb2.Run]:
        """Return the newest runs."""
        request = workflow_pb2.ListRunsRequest(page_size=limit)
        found: list[run_pb2.Run] = []
        while True:
            response = await self._rpc.call(self._rpc.workflows.ListRuns(request))
            found.extend(response.runs)
            request.page_token = response.next_page_token
            if not request.page_token or len(found) >= limit:
                return found[:limit]

    async def list_tasks(self, run_id: str) -> list[run_pb2.TaskRun]:
        """Return a run's tasks as they are now, in the order of their definition. Raises NotFoundError."""
        request = _made(task_pb2.ListTasksRequest, run_id=run_id)
        found: list[run_pb2.TaskRun] = []
        while True:
            response = await self._rpc.call(self._rpc.tasks.ListTasks(request))
            found.extend(response.tasks)
            request.page_token = response.next_page_token
            if not request.page_token:
                return found

    async def explain(self, run_id: str, task_id: str) -> task_pb2.ExplainTaskResponse:
        """Return why a task waits. Raises NotFoundError."""
        request = _made(task_pb2.ExplainTaskRequest, run_id=run_id, task_id=task_id)
        return await self._rpc.call(self._rpc.tasks.ExplainTask(request))

    async def cancel_run(self, run_id: str, reason: str = "") -> run_pb2.Run:
        """Cancel a run. Raises NotFoundError."""
        request = _made(workflow_pb2.CancelRunRequest, run_id=run_id, reason=reason)
        return (await self._rpc.call(self._rpc.workflows.CancelRun(request))).run

    async def cancel_task(self, run_id: str, task_id: str) -> run_pb2.TaskRun:
        """Cancel one task of a run. Raises NotFoundError."""
        request = _made(task_pb2.CancelTaskRequest, run_id=run_id, task_id=task_id)
        return (await self._rpc.call(self._rpc.tasks.CancelTask(request))).task

    async def nodes(self) -> list[worker_pb2.Node]:
        """Return the nodes in the ledger."""
        return list((await self._rpc.call(self._rpc.workers.ListNodes(worker_pb2.ListNodesRequest()))).nodes)

    async def drain_node(self, node_id: str, deadline: float | None = None) -> worker_pb2.Node:
        """Let a node finish what it runs and leave; what still runs after `deadline` seconds moves to other nodes.

        Returns the node as it is now. Raises NotFoundError.
        """
        request = _made(worker_pb2.DrainNodeRequest, node_id=node_id)
        if deadline is not None:
            request.deadline.FromNanoseconds(int(deadline * 1e9))
        return (await self._rpc.call(self._rpc.workers.DrainNode(request))).node

    async def cluster(self) -> worker_pb2.GetClusterResponse:
        """Return facts about the server and its cluster."""
        return await self._rpc.call(self._rpc.workers.GetCluster(worker_pb2.GetClusterRequest()))

    async def _download(self, artifact_id: str) -> bytearray:
        data = bytearray()
        request = _made(results_pb2.ReadArtifactRequest, artifact_id=artifact_id)
        async for chunk in self._rpc.results.ReadArtifact(request):
            data += chunk.data
        return data

    async def upload(self, data: bytes) -> payload_pb2.Artifact:
        """Store bytes on the server. Raises RequestError."""

        async def chunks() -> AsyncIterator[results_pb2.WriteArtifactRequest]:
            for start in range(0, len(data), CHUNK_BYTES):
                yield results_pb2.WriteArtifactRequest(data=data[start : start + CHUNK_BYTES])

        for _ in range(UPLOAD_TRIES):
            try:
                with self._rpc.closing():
                    return (await self._rpc.results.WriteArtifact(chunks())).artifact
            except grpc.aio.AioRpcError as error:
                if error.details() != LOST_STATUS:
                    raise self._rpc.error_of(error) from None
        text = f"the server at {self.target} ended an upload of {len(data)} bytes before it had all of it"
        raise errors.UnavailableError(f"{text}; its log may say why")


def _declared(run_id: str) -> convert.Declared:
    return run_id.declared if isinstance(run_id, RunId) else {}


async def _last(call: Any) -> workflow_pb2.ExecuteWorkflowResponse | None:
    try:
        last = await call.read()
    except grpc.aio.AioRpcError:
        return None
    return last if isinstance(last, workflow_pb2.ExecuteWorkflowResponse) else None


M = TypeVar("M", bound=Message)


def _made(kind: type[M], **fields: Any) -> M:
    """Return a request. Raises InvalidArgumentError for what no message can hold."""
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        shown = ", ".join(f"{name}={value!r}" for name, value in fields.items())
        raise errors.InvalidArgumentError(f"a request cannot hold {shown}: {error}") from error


@contextmanager
def _building() -> Iterator[None]:
    try:
        yield
    except UnicodeEncodeError as error:
        text = f"the name or label {error.object!r} cannot be sent: it holds half a character at {error.start}"
        raise errors.TaskDefinitionError(text) from None


def _duration(seconds: float) -> Duration:
    return Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
