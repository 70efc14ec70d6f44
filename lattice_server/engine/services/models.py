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
from lattice_server.engine.services.budgets import Budgets, of_route
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
        interface: str,
    ) -> None:
        self._orchestrator = orchestrator
        self._services = services
        self._keys = Keys()
        self._budgets = Budgets(orchestrator.answer)
        lose = self._budgets.lose
        self._gateways = Gateways(orchestrator, function, self._routes, on_ready, lose, observers, interface)
        self._nodes: frozenset[str] = frozenset()

    def serve(self, question: QuestionAsked) -> bool:
        """Take a question of a gateway; False when none asks it, or when it waits for a service."""
        if not self._gateways.is_gateway(question) or question.name == answers.GATEWAY_WAIT:
            return False
        if question.name == answers.GATEWAY_BUDGET:
            self._budgets.report(question)
        elif question.name == answers.GATEWAY_PERMITS:
            self._budgets.wait(question)
        elif question.name == answers.GATEWAY_KEY:
            self._tell_key(question)
        else:
            self._gateways.serve(question)
        return True

    def _tell_key(self, question: QuestionAsked) -> None:
        """Tell a gateway the model of a key of an attempt on its node, or on the node of the gateway that passed it."""
        content = answers.content_of(question)
        passed_by = str(content.get("gateway", ""))
        node_id = self._gateways.node_named(passed_by) if passed_by else self._gateways.node_of(question)
        grant = self._keys.find(str(content.get("key", "")), node_id)
        value = {} if grant is None else {"service": key_of(grant.service, grant.tenant)}
        self._orchestrator.answer(answers.answered(question, value))

    def waits(self, question: QuestionAsked) -> bool:
        """Whether a gateway asks to wait for a service."""
        return question.name == answers.GATEWAY_WAIT and self._gateways.is_gateway(question)

    def give(self, entry: ServiceEntry, question: QuestionAsked, use: Use, node_id: str) -> bool:
        """Give a task the address of the gateway of its node, and a key; False while the gateway starts."""
        endpoint = self._gateways.endpoint(node_id)
        if endpoint is None:
            self._cover()
            return False
        key = self._keys.issue(entry.tenant, entry.name, use, node_id)
        value = {"base_url": f"http://{endpoint}/v1", "api_key": key, "model": entry.name}
        self._orchestrator.answer(answers.answered(question, value))
        return True

    def update(self) -> None:
        """Take the definitions of models, and tell the gateways which instances take requests.

        The gateways, which hold a slot of their nodes each, end when the last model is gone and no attempt left.
        """
        self._budgets.define(self._services())
        self._cover()
        self._gateways.update()
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

    def _cover(self) -> None:
        """Start gateways on the nodes of instances, once tasks of other nodes use models."""
        using = set(self._gateways.nodes())
        for node_id in self._hosts():
            if using - {node_id}:
                self._gateways.endpoint(node_id)

    def _hosts(self) -> set[str]:
        """Return the nodes that have instances of models."""
        machines = (entry.machine for entry in self._services() if entry.machine.spec.engine)
        return {one.node_id for machine in machines for one in machine.instances.values() if one.node_id}

    def _leave(self) -> None:
        has_models = any(entry.machine.spec.engine for entry in self._services())
        wanted = self._nodes | self._hosts() if has_models else frozenset[str]()
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
                    **of_route(spec),
                }
            elif spec.engine:
                ready = entry.machine.ready
                others = {
                    one.instance_id: self._gateways.remote(one.node_id) for one in ready if one.node_id != node_id
                }
                found[key_of(entry.name, entry.tenant)] = {
                    "model": spec.model,
                    "key": spec.environment.get(KEY_VARIABLE, ""),
                    "replicas": {one.instance_id: one.endpoint for one in ready if one.node_id == node_id},
                    "remote": {name: where for name, where in others.items() if where is not None},
                    "is_away": bool(ready) and all(self._gateways.is_unreachable(one.node_id) for one in ready),
                    **of_route(spec),
                }
        return found


def reachable(instances: Iterable[Instance], node_id: str) -> list[Instance]:
    """Return the instances that processes on a node reach: those on it if any, else those of cluster reach."""
    present = list(instances)
    here = [found for found in present if found.node_id == node_id]
    return here or [found for found in present if found.spec.reach is Reach.CLUSTER]
