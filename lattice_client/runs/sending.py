"""Owns the retries of calls that bring work to a server. Rule: a call is repeated only if it cannot start work twice.

A call is repeated later while the server has too much work, and at once with the code or the parts of a graph that the
server no longer has.
"""

import random
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import TypeVar

from lattice.v1 import workflow_pb2

from lattice_client import errors
from lattice_client.convert import specs
from lattice_client.graph.nodes import LatticeTask
from lattice_client.runs.known_code import KnownCode
from lattice_client.runs.parts import GraphMessage, Parts
from lattice_client.transport.channel import Channel

T = TypeVar("T")


class Sender:
    """Sends graphs, and repeats refused calls. `known_code` are the digests of code that the server has."""

    def __init__(self, channel: Channel, admission_timeout_s: float) -> None:
        self.known_code = KnownCode()
        self._rpc = channel
        self._admission_timeout_s = admission_timeout_s

    async def prepare(self, graph: GraphMessage, tasks: Collection[LatticeTask], around_bytes: int = 0) -> None:
        """Put the code of tasks into their message; send the message in parts when it is too large with other fields.

        Raises TaskDefinitionError, RequestError.
        """
        if graph.draft_id:
            return
        specs.fill_code(graph.spec, tasks, self.known_code)
        if parts := await Parts.needed(self._rpc, graph.spec, around_bytes):
            graph.draft_id = await self.send_parts(graph.spec, parts)

    async def send_parts(self, spec: workflow_pb2.WorkflowSpec, parts: Parts) -> str:
        """Send the bundles, functions and tasks of a workflow; return the id of their draft on the server."""
        draft_id = ""
        for part in parts.of(spec):
            draft_id = part.draft_id
            await self.admitted(partial(self._rpc.call, self._rpc.workflows.AddTasks, part))
        return draft_id

    async def accepted(self, call: Callable[[], Awaitable[T]], graph: GraphMessage | None = None) -> T:
        """Make a call that brings work; repeat it when the server lacks code or parts that were sent before."""
        graph = graph or GraphMessage(workflow_pb2.WorkflowSpec())
        while True:
            # Asked before the call: when the call of another thread fails as well, that thread clears the digests.
            may_lack_code = bool(self.known_code)
            try:
                found = await self.admitted(call)
            except errors.PreconditionError as error:
                if error.reason != "FUNCTION_MISSING" or not may_lack_code:
                    raise
                self.known_code.clear()
            except errors.NotFoundError as error:
                if error.reason != "DRAFT_NOT_FOUND" or not graph.draft_id:
                    raise
            else:
                self.known_code.note_sent(graph.spec.functions.values())
                return found
            graph.draft_id = ""

    async def admitted(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call; repeat it later, until the admission timeout, while the server has too much work."""
        deadline = self._rpc.now() + self._admission_timeout_s
        while True:
            try:
                return await call()
            except errors.ResourceExhaustedError as error:
                if error.retry_after_s is None:
                    raise
                # Random, so that clients refused at the same time do not return at the same time.
                wait_s = error.retry_after_s * random.uniform(0.5, 1.5)
                if self._rpc.now() + wait_s > deadline:
                    raise
                await self._rpc.sleep(wait_s)
