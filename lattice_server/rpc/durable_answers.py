"""Owns when answers are sent by a server with a journal.

Rule: an answer, or a message of a stream, is sent once all that it can tell is durable. So no caller learns what a
restart could take back.
"""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf.message import Message
from lattice.v1 import cluster_pb2, workflow_pb2

from lattice_server.core.errors import LatticeError
from lattice_server.core.tenancy import Reach
from lattice_server.engine.recording.run_journal import RunJournal
from lattice_server.engine.restoring.run_restorer import RunRestorer
from lattice_server.rpc import callers

Method = Callable[[Any, Any], Any]
# Requests that are answered before all live runs are restored, besides calls that name a run.
OF_NO_RUN = (
    cluster_pb2.GetServerInfoRequest,
    cluster_pb2.ListNodesRequest,
    workflow_pb2.GetWorkflowRequest,
    workflow_pb2.ListWorkflowsRequest,
)
# They need other runs too, besides the run in the request.
OF_SEVERAL_RUNS = (workflow_pb2.DeleteRunRequest, workflow_pb2.RetryRunRequest)


class DurableAnswers:
    """Wraps the methods of servicers. The run that a request names is read from the journal before the call.

    After the start, a call that needs other runs as well waits until all live runs are restored.
    """

    def __init__(self, journal: RunJournal, restorer: RunRestorer) -> None:
        self._journal = journal
        self._restorer = restorer

    def wrap(self, method: Method) -> Method:
        """Return a method that answers later than this one, if it has to."""

        def call(request: Any, context: Any) -> Any:
            # Neither a coroutine nor a generator has begun when it is made.
            found = method(request, context)
            return self._each(request, found) if hasattr(found, "__aiter__") else self._one(request, found)

        return call

    async def _one(self, request: Any, answer: Any) -> Any:
        try:
            await self.recall(request)
        except BaseException:
            answer.close()
            raise
        found = await answer
        await self._journal.wait()
        return found

    async def _each(self, request: Any, answers: Any) -> AsyncIterator[Any]:
        async with contextlib.aclosing(answers):
            await self.recall(request)
            async for answer in answers:
                await self._journal.wait()
                yield answer

    async def recall(self, request: Any) -> None:
        """Have the runs that a request needs in memory. Requests of a stream are given one by one."""
        if not isinstance(request, Message) or isinstance(request, OF_NO_RUN):
            return
        if isinstance(request, OF_SEVERAL_RUNS):
            await self._restorer.restored()
        if isinstance(request, workflow_pb2.DeleteRunRequest):
            return  # A run is deleted without being read.
        # Either a run, or a request that starts one.
        named: Any = request
        if "run" in request.DESCRIPTOR.fields_by_name and request.HasField("run"):
            named = named.run
        run_id = getattr(named, "run_id", "")
        if not run_id or not isinstance(run_id, str):
            await self._restorer.restored()
            return
        try:
            reach = callers.reach()
            if tenant := getattr(named, "tenant", ""):
                reach = Reach(callers.tenant_named(tenant), reach.is_any)
        except LatticeError:
            return  # The method refuses the request.
        await self._restorer.recall(run_id, reach)
