"""Owns the addresses that tasks are given. Rule: a task is given that of an instance which its node reaches."""

from lattice_server.core.messages import QuestionAsked
from lattice_server.core.services.model import ServiceState
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.services import answers
from lattice_server.engine.services.entry import ServiceEntry, Use, use_of
from lattice_server.engine.services.models import Models, reachable


class Addresses:
    """Answers the tasks that wait for a service."""

    def __init__(self, orchestrator: Orchestrator, models: Models) -> None:
        self._orchestrator = orchestrator
        self._models = models

    def answer(self, entry: ServiceEntry) -> bool:
        """Answer the tasks that wait for a service which is ready, or which has failed; False when it is neither."""
        machine = entry.machine
        if machine.takes_requests:
            for question in list(entry.waiting.values()):
                self._give(entry, question)
        elif machine.state in {ServiceState.FAILED, ServiceState.STOPPING}:
            failure = machine.starts.given_up
            why = "it is being stopped" if failure is None else failure.message
            for question in entry.waiting.values():
                text = f"service {entry.name!r} has no instance: {why}"
                self._orchestrator.answer(answers.refused(question, "ServiceFailedError", text))
            entry.waiting.clear()
        else:
            return False
        return True

    def _give(self, entry: ServiceEntry, question: QuestionAsked) -> None:
        """Give a task the address it waits for; that of a gateway may have to wait until the gateway has started."""
        if question.name == answers.GATEWAY_WAIT:
            del entry.waiting[question.question_id]
            self._orchestrator.answer(answers.answered(question, {}))
            return
        use, node_id = use_of(question), self._node_of(question)
        if question.name == answers.LLM:
            if self._models.give(entry, question, use, node_id):
                self._add_user(entry, use)
                del entry.waiting[question.question_id]
            return
        found = reachable(entry.machine.ready, node_id)
        del entry.waiting[question.question_id]
        if not found:
            nodes = ", ".join(sorted({instance.node_id for instance in entry.machine.ready}))
            text = f"service {entry.name!r} listens on the loopback address of {nodes}, and this task runs on {node_id}"
            text += "; start the service with reach='cluster', or give the task a node_selector"
            self._orchestrator.answer(answers.refused(question, "ServiceUnreachableError", text))
            return
        best = min(found, key=lambda instance: (instance.in_flight, instance.number))
        self._add_user(entry, use)
        value = {"endpoint": best.endpoint, "instance_id": best.instance_id, "model": entry.machine.spec.model}
        self._orchestrator.answer(answers.answered(question, value))

    def _add_user(self, entry: ServiceEntry, use: Use) -> None:
        run = self._orchestrator.runs.get(use[0])
        # A task that needs it by its definition is counted by the scheduler.
        if run is None or entry.name not in run.run.tasks[use[1]].spec.services:
            entry.users.add(use)

    def _node_of(self, question: QuestionAsked) -> str:
        run = self._orchestrator.runs.get(question.run_id)
        return "" if run is None else run.run.tasks[question.task_id].node_id
