"""Owns the gateways: one process on each node from which tasks reach models.

A gateway is a run of the server's own with one task, pinned to its node. It asks for the routes it does not have yet,
for the meaning of a key it sees for the first time, and to wait for a model that has no instance.
Rule: each answer with new routes names the keys that have ended since the last answer.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from uuid import uuid4

from lattice_server.core.errors import LatticeError
from lattice_server.core.messages import QuestionAsked, TaskStarted
from lattice_server.core.model import NODE_LABEL, Function, Resources, TaskSpec, WorkflowSpec
from lattice_server.core.tenancy import SEPARATOR
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.ports import ServiceObserver
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.services import answers
from lattice_server.engine.services.authority import Authority
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
        host: the address of the node, at which gateways of other nodes reach it.
        endpoint: its address, once it listens; a gateway that replaces it listens there too.
        peer: its address for gateways of other nodes; empty when it has none.
        is_ready: whether it listens now.
        question: its open question for routes.
        is_behind: whether it has not been told the present routes.
        revoked: keys that it may know and that have ended.
    """

    node_id: str
    run: RunEntry | None = None
    host: str = ""
    endpoint: str = ""
    peer: str = ""
    is_ready: bool = False
    question: QuestionAsked | None = None
    is_behind: bool = True
    revoked: list[str] = field(default_factory=list)


class Gateways:
    """The gateways by node. `routes` returns the routes for a node, `on_ready` is called when a gateway listens.

    `on_lost` takes the key of the run of each gateway that has ended. `interface` is the address of the server's own
    machine for other machines, whose worker may have no other one than the loopback address.
    """

    def __init__(
        self,
        orchestrator: Orchestrator,
        function: Function,
        routes: Routes,
        on_ready: Callable[[], None],
        on_lost: Callable[[str], None],
        observers: Sequence[ServiceObserver],
        interface: str,
    ) -> None:
        self._orchestrator = orchestrator
        self._function = function
        self._routes = routes
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._observers = observers
        self._interface = interface
        self._authority = Authority()
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

    def remote(self, node_id: str) -> tuple[str, str] | None:
        """Return the address and the name of the gateway of a node for other gateways; None when it has none now."""
        gateway = self._gateways.get(node_id)
        if gateway is None or gateway.run is None or not gateway.is_ready or not gateway.peer:
            return None
        return gateway.peer, gateway.run.run_id

    def is_unreachable(self, node_id: str) -> bool:
        """Whether the gateway of a node listens, and not for other gateways."""
        gateway = self._gateways.get(node_id)
        return gateway is not None and gateway.is_ready and not gateway.peer

    def node_named(self, name: str) -> str | None:
        """Return the node of a gateway that other gateways know by a name; None when there is none."""
        return next((one.node_id for one in self._of_run.values() if one.run and one.run.run_id == name), None)

    def node_of(self, question: QuestionAsked) -> str:
        """Return the node of the gateway that asks a question."""
        return self._of_run[question.run_id].node_id

    def serve(self, question: QuestionAsked) -> None:
        """Take a question of a gateway about itself: `start`, `ready`, `routes` or `report`."""
        gateway = self._of_run[question.run_id]
        match question.name:
            case answers.GATEWAY_START:
                self._answer_start(gateway, question)
            case answers.GATEWAY_READY:
                content = answers.content_of(question)
                gateway.endpoint, gateway.peer = str(content.get("endpoint", "")), str(content.get("peer", ""))
                gateway.is_ready = True
                self._orchestrator.answer(answers.answered(question, {}))
                self._on_ready()
                self.update()
            case answers.GATEWAY_REPORT:
                self._take_report(answers.content_of(question).get("requests"))
                self._orchestrator.answer(answers.answered(question, {}))
            case _:
                gateway.question = question
                self._send(gateway)

    def _answer_start(self, gateway: Gateway, question: QuestionAsked) -> None:
        assert gateway.run is not None
        request = str(answers.content_of(question).get("request", ""))
        try:
            certificate = self._authority.sign(request, gateway.run.run_id)
        except ValueError as error:
            self._orchestrator.answer(answers.refused(question, "QuestionError", str(error)))
            return
        start = {"endpoint": gateway.endpoint, "host": gateway.host, "reports": bool(self._observers)}
        start |= {"certificate": certificate, "authority": self._authority.certificate}
        self._orchestrator.answer(answers.answered(question, start))

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
                self._on_lost(gateway.run.key)
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
        entry.on_effects = lambda effects: self._observe(gateway, entry, effects)

    def _observe(self, gateway: Gateway, entry: RunEntry, effects: Sequence[object]) -> None:
        """Note where a gateway starts, and start one again that has ended."""
        for started in effects:
            if isinstance(started, TaskStarted):
                gateway.host = self._interface if _is_beside(started.node_ip) else started.node_ip
        if not entry.run.is_terminal or entry.key not in self._of_run:
            return
        del self._of_run[entry.key]
        self._on_lost(entry.key)
        gateway.is_ready, gateway.question, gateway.is_behind, gateway.revoked = False, None, True, []
        self._orchestrator.ended.note_read(entry)
        if self._orchestrator.is_stopping:
            return
        self.update()
        log.warning("the gateway of a node ended and is started again", extra={"node_id": gateway.node_id})
        # Later, so that a gateway that cannot start does not keep the server busy.
        asyncio.get_running_loop().call_later(RESTART_S, self._start, gateway)


def _is_beside(node_ip: str) -> bool:
    """Whether an address is that of a worker beside the server, which dials a socket or the loopback address."""
    try:
        return not node_ip or ip_address(node_ip).is_loopback
    except ValueError:
        return False
