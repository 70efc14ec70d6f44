"""Owns the gateways: one process on each node from which tasks reach models.

A gateway is a run of the server's own with one task, pinned to its node. It asks for the routes it does not have yet,
for the meaning of a key it sees for the first time, and to wait for a model that has no instance.
Rule: each answer with new routes names the keys that have ended since the last answer.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from lattice_server.core.errors import LatticeError
from lattice_server.core.messages import QuestionAsked
from lattice_server.core.model import NODE_LABEL, Function, Resources, TaskSpec, WorkflowSpec
from lattice_server.core.tenancy import SEPARATOR
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.ports import ServiceObserver
from lattice_server.engine.run_entry import RunEntry
from lattice_server.engine.services import answers
from lattice_server.engine.services.instance_runs import ONCE

log = logging.getLogger(__name__)

LABEL = "lattice/gateway"
RESTART_S = 1.0
MAX_REPORTED = 1000  # Requests of one report.
Routes = Callable[[str], Mapping[str, Any]]


@dataclass(slots=True, eq=False)
class Gateway:
    """The gateway of one node.

    Attributes:
        node_id: the node.
        run: its run.
        endpoint: its address, once it listens; a gateway that replaces it listens there too.
        is_ready: whether it listens now.
        question: its open question for routes.
        is_behind: whether it has not been told the present routes.
        revoked: keys that it may know and that have ended.
    """

    node_id: str
    run: RunEntry | None = None
    endpoint: str = ""
    is_ready: bool = False
    question: QuestionAsked | None = None
    is_behind: bool = True
    revoked: list[str] = field(default_factory=list)


class Gateways:
    """The gateways by node. `routes` returns the routes for a node, `on_ready` is called when a gateway listens."""

    def __init__(
        self,
        orchestrator: Orchestrator,
        function: Function,
        routes: Routes,
        on_ready: Callable[[], None],
        observers: Sequence[ServiceObserver],
    ) -> None:
        self._orchestrator = orchestrator
        self._function = function
        self._routes = routes
        self._on_ready = on_ready
        self._observers = observers
        self._gateways: dict[str, Gateway] = {}
        self._of_run: dict[str, Gateway] = {}

    def endpoint(self, node_id: str) -> str | None:
        """Return the address of the gateway of a node, which is started if there is none; None until it listens."""
        gateway = self._gateways.get(node_id)
        if gateway is None:
            gateway = self._gateways[node_id] = Gateway(node_id)
            self._start(gateway)
        return gateway.endpoint if gateway.is_ready else None

    def is_gateway(self, question: QuestionAsked) -> bool:
        """Whether a gateway asks a question."""
        return question.run_id in self._of_run

    def node_of(self, question: QuestionAsked) -> str:
        """Return the node of the gateway that asks a question."""
        return self._of_run[question.run_id].node_id

    def serve(self, question: QuestionAsked) -> None:
        """Take a question of a gateway about itself: `start`, `ready`, `routes` or `report`."""
        gateway = self._of_run[question.run_id]
        match question.name:
            case answers.GATEWAY_START:
                start = {"endpoint": gateway.endpoint, "reports": bool(self._observers)}
                self._orchestrator.answer(answers.answered(question, start))
            case answers.GATEWAY_READY:
                gateway.endpoint, gateway.is_ready = str(answers.content_of(question).get("endpoint", "")), True
                self._orchestrator.answer(answers.answered(question, {}))
                self._on_ready()
            case answers.GATEWAY_REPORT:
                self._take_report(answers.content_of(question).get("requests"))
                self._orchestrator.answer(answers.answered(question, {}))
            case _:
                gateway.question = question
                self._send(gateway)

    def _take_report(self, requests: object) -> None:
        """Tell the observers about requests; entries of another form are ignored."""
        for request in requests[:MAX_REPORTED] if isinstance(requests, list) else ():
            match request:
                case [str(service), int(status), int(seconds) | float(seconds)]:
                    for observer in self._observers:
                        observer.note_request(service.partition(SEPARATOR)[0], status, seconds)
                case _:
                    continue

    def update(self, revoked: Sequence[str] = ()) -> None:
        """Tell all gateways that routes have changed, and which keys have ended."""
        for gateway in self._gateways.values():
            gateway.is_behind = True
            gateway.revoked += revoked
            self._send(gateway)

    def leave(self, node_ids: Set[str]) -> None:
        """End the gateways of nodes that are to be left."""
        for node_id in node_ids & self._gateways.keys():
            gateway = self._gateways.pop(node_id)
            if gateway.run is not None and self._of_run.pop(gateway.run.key, None) is not None:
                self._orchestrator.cancel_run(gateway.run.run_id, "its node is left")

    def nodes(self) -> Set[str]:
        """Return the nodes that have a gateway."""
        return self._gateways.keys()

    def _send(self, gateway: Gateway) -> None:
        if gateway.question is None or not gateway.is_behind:
            return
        value = {"services": self._routes(gateway.node_id), "revoked": gateway.revoked}
        self._orchestrator.answer(answers.answered(gateway.question, value))
        gateway.question, gateway.is_behind, gateway.revoked = None, False, []

    def _start(self, gateway: Gateway) -> None:
        if self._gateways.get(gateway.node_id) is not gateway:
            return
        task = TaskSpec(
            task_id="gateway",
            function=self._function,
            display_name=f"gateway of {gateway.node_id}",
            outputs=("ended",),
            resources=Resources(cpu=0.0),
            retry=ONCE,
            node_selector=((NODE_LABEL, gateway.node_id),),
            is_service=True,
        )
        run_id = f"gateway-{uuid4().hex}"
        try:
            entry, _ = self._orchestrator.start_run(
                run_id,
                WorkflowSpec(tasks=(task,), display_name="gateway"),
                parameters={},
                labels={LABEL: gateway.node_id},
                priority=0,
                fingerprint=run_id,
                is_transient=True,
            )
        except LatticeError as error:
            # The node has left, and the tasks there with it.
            log.info("no gateway is started: %s", error.message, extra={"node_id": gateway.node_id})
            self._gateways.pop(gateway.node_id, None)
            return
        gateway.run = entry
        self._of_run[entry.key] = gateway
        entry.on_effects = lambda _: self._observe(gateway, entry)

    def _observe(self, gateway: Gateway, entry: RunEntry) -> None:
        """Start a gateway again that has ended."""
        if not entry.run.is_terminal or entry.key not in self._of_run:
            return
        del self._of_run[entry.key]
        gateway.is_ready, gateway.question, gateway.is_behind, gateway.revoked = False, None, True, []
        self._orchestrator.ended.note_read(entry)
        if self._orchestrator.is_stopping:
            return
        log.warning("the gateway of a node ended and is started again", extra={"node_id": gateway.node_id})
        # Later, so that a gateway that cannot start does not keep the server busy.
        asyncio.get_running_loop().call_later(RESTART_S, self._start, gateway)
