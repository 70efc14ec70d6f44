"""Owns how tasks reach models: gateways, their routes, and the keys of attempts.

Rule: a gateway accepts a key only as long as the attempt that it was given to runs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lattice_server.core.messages import QuestionAsked
from lattice_server.core.model import Function, NodeSpec
from lattice_server.core.services.engines import KEY_VARIABLE
from lattice_server.core.services.instances import Instance
from lattice_server.core.services.model import Reach
from lattice_server.core.tenancy import key_of
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.ports import ServiceObserver
from lattice_server.engine.services import answers
from lattice_server.engine.services.entry import ServiceEntry, Use
from lattice_server.engine.services.gateways import Gateways
from lattice_server.engine.services.keys import Keys


class Models:
    """The doors to the services that serve models. `services` returns all services."""

    def __init__(
        self,
        orchestrator: Orchestrator,
        function: Function,
        services: Callable[[], Iterable[ServiceEntry]],
        on_ready: Callable[[], None],
        observers: Sequence[ServiceObserver],
    ) -> None:
        self._orchestrator = orchestrator
        self._services = services
        self._keys = Keys()
        self._gateways = Gateways(orchestrator, function, self._routes, on_ready, observers)
        self._nodes: frozenset[str] = frozenset()

    def serve(self, question: QuestionAsked) -> bool:
        """Take a question of a gateway; False when none asks it, or when it waits for a service."""
        if not self._gateways.is_gateway(question) or question.name == answers.GATEWAY_WAIT:
            return False
        if question.name == answers.GATEWAY_KEY:
            grant = self._keys.find(str(answers.content_of(question).get("key", "")))
            is_here = grant is not None and grant.node_id == self._gateways.node_of(question)
            value = {"service": key_of(grant.service, grant.tenant)} if grant is not None and is_here else {}
            self._orchestrator.answer(answers.answered(question, value))
        else:
            self._gateways.serve(question)
        return True

    def waits(self, question: QuestionAsked) -> bool:
        """Whether a gateway asks to wait for a service."""
        return question.name == answers.GATEWAY_WAIT and self._gateways.is_gateway(question)

    def give(self, entry: ServiceEntry, question: QuestionAsked, use: Use, node_id: str) -> bool:
        """Give a task the address of the gateway of its node, and a key; False while the gateway starts."""
        endpoint = self._gateways.endpoint(node_id)
        if endpoint is None:
            return False
        key = self._keys.issue(entry.tenant, entry.name, use, node_id)
        value = {"base_url": f"http://{endpoint}/v1", "api_key": key, "model": entry.name}
        self._orchestrator.answer(answers.answered(question, value))
        return True

    def update(self) -> None:
        """Tell the gateways that other instances take requests."""
        self._gateways.update()

    def forget(self) -> None:
        """End the gateways, which hold a slot of their nodes each, when the last model is gone and no attempt left."""
        self._leave()

    def revoke(self, uses: Iterable[Use]) -> None:
        """End the keys of attempts."""
        if ended := self._keys.revoke(uses):
            self._gateways.update(ended)
            self._leave()

    def know(self, nodes: tuple[NodeSpec, ...]) -> None:
        """Take the nodes that accept leases; the gateways of others end when no attempt uses them."""
        self._nodes = frozenset(node.node_id for node in nodes)
        self._leave()

    def _leave(self) -> None:
        has_models = any(entry.machine.spec.engine for entry in self._services())
        wanted = self._nodes if has_models else frozenset()
        self._gateways.leave(self._gateways.nodes() - wanted - self._keys.nodes())

    def _routes(self, node_id: str) -> Mapping[str, Any]:
        found = {}
        for entry in self._services():
            spec = entry.machine.spec
            if spec.base_url:
                found[key_of(entry.name, entry.tenant)] = {
                    "model": spec.model,
                    "key": spec.api_key,
                    "replicas": {entry.name: spec.base_url},
                    "is_away": False,
                }
            elif spec.engine:
                replicas = reachable(entry.machine.ready, node_id)
                found[key_of(entry.name, entry.tenant)] = {
                    "model": spec.model,
                    "key": spec.environment.get(KEY_VARIABLE, ""),
                    "replicas": {one.instance_id: one.endpoint for one in replicas},
                    "is_away": bool(entry.machine.ready) and not replicas,
                }
        return found


def reachable(instances: Iterable[Instance], node_id: str) -> list[Instance]:
    """Return the instances that processes on a node reach: those on it if any, else those of cluster reach."""
    present = list(instances)
    here = [found for found in present if found.node_id == node_id]
    return here or [found for found in present if found.spec.reach is Reach.CLUSTER]
