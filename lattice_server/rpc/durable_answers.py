"""Owns when answers are sent by a server with a journal.

Rule: an answer, or a message of a stream, is sent once all that it can tell is durable. So no caller learns what a
restart could take back.
"""

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from lattice.v1 import workflow_pb2

from lattice_server.core.errors import LatticeError
from lattice_server.core.tenancy import Reach
from lattice_server.engine.run_journal import RunJournal
from lattice_server.engine.run_restorer import RunRestorer
from lattice_server.rpc import callers

Method = Callable[[Any, Any], Any]


class DurableAnswers:
    """Wraps the methods of servicers. The ended run that a request names is read from the journal before the call."""

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
        """Read the ended run that a request names from the journal, if it is there."""
        if isinstance(request, workflow_pb2.DeleteRunRequest):
            return  # A run is deleted without being read.
        named = getattr(request, "run", request)
        run_id = getattr(named, "run_id", "")
        if not run_id or not isinstance(run_id, str):
            return
        reach = callers.reach()
        if tenant := getattr(named, "tenant", ""):
            try:
                reach = Reach(callers.tenant_named(tenant), reach.is_any)
            except LatticeError:
                return  # The method refuses the request.
        await self._restorer.recall(run_id, reach)
