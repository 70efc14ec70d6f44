"""Carries out the decisions of the machines of services, on the main thread: runs of instances, timers and answers.

Rule: the event loop takes reports of runs and instances in turn, so that no machine runs inside another one.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, assert_never

from lattice_server.core.errors import LatticeError
from lattice_server.core.messages import (
    QuestionAsked,
    RunFinished,
    TaskCancelled,
    TaskFailed,
    TaskRetrying,
    TaskStarted,
    TaskSucceeded,
)
from lattice_server.core.model import Function
from lattice_server.core.services.messages import (
    CancelInstance,
    Effect,
    Event,
    InstanceEnded,
    InstanceReady,
    InstanceStarted,
    InstanceUnhealthy,
    InstanceWaits,
    LoadReported,
    RoutesChanged,
    ServiceGone,
    StartInstance,
    StopInstance,
)
from lattice_server.core.tenancy import Reach, id_of
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.ports import ServiceObserver
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.services import answers, instance_runs
from lattice_server.engine.services.entry import InstanceRun, ServiceEntry

log = logging.getLogger(__name__)


class ServiceDriver:
    """Drives the machines of services.

    `function` is the code of an instance's task. `on_routes` is called when other instances of a service than before
    take requests, `on_gone` when a service has ended.
    """

    def __init__(self, orchestrator: Orchestrator, function: Function, observers: Sequence[ServiceObserver]) -> None:
        self._orchestrator = orchestrator
        self._observers = observers
        self._function = function
        self._instances: dict[str, tuple[ServiceEntry, str]] = {}  # By the key of their run.
        self.on_routes: Callable[[ServiceEntry], None] = lambda service: None
        self.on_gone: Callable[[ServiceEntry], None] = lambda service: None

    def begin(self, service: ServiceEntry) -> None:
        """Begin with a new service."""
        self._perform(service, service.machine.start(time.monotonic()))

    def post(self, service: ServiceEntry, event: Event) -> None:
        """Have the machine of a service take an event."""
        now = time.monotonic()
        effects = service.machine.handle(event, now)
        for observer in self._observers:
            observer.note(service, event, now)
        self._perform(service, effects)

    def serve(self, question: QuestionAsked) -> bool:
        """Take a question of an instance; False when no instance asks it."""
        found = self._instances.get(question.run_id)
        if found is None:
            return False
        service, instance_id = found
        content = answers.content_of(question)
        match question.name:
            case answers.PROGRAM:
                instance = service.machine.instances.get(instance_id)
                if instance is not None:
                    program = instance_runs.program_of(instance.spec, instance)
                    self._answer(answers.answered(question, program))
            case answers.CONTROL:
                run = service.runs[instance_id]
                run.control = question
                self._send_stop(run)
            case answers.REPORT:
                self._take_report(service, instance_id, content)
                self._answer(answers.answered(question, {}))
            case _:
                self._answer(answers.refused(question, "QuestionError", f"there is no question {question.name!r}"))
        return True

    def _answer(self, answer: Any) -> None:
        self._orchestrator.answer(answer)

    def _take_report(self, service: ServiceEntry, instance_id: str, report: Any) -> None:
        instance = service.machine.instances.get(instance_id)
        if instance is None:
            return
        lines = [str(line) for line in report.get("lines", ())]
        if lines:
            service.log.add(instance_id, lines, time.time())
            service.wake()
        match report.get("state"):
            case "ready":
                self.post(service, InstanceReady(instance_id, str(report["endpoint"])))
            case "starting":
                self.post(service, InstanceWaits(instance_id, str(report.get("detail", ""))))
            case "unhealthy":
                detail = str(report.get("detail", ""))
                self.post(service, InstanceUnhealthy(instance_id, int(report.get("failures", 1)), detail))
            case "ended":
                # Its lease is released with the end of the attempt, which follows.
                service.runs[instance_id].failure = instance_runs.reported(service, instance, report)
            case _:
                pass
        if isinstance(in_flight := report.get("in_flight"), int):
            self.post(service, LoadReported(instance_id, max(0, in_flight)))

    # Effects.

    def _perform(self, service: ServiceEntry, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case StartInstance():
                    self._start(service, effect.instance_id)
                case StopInstance():
                    if (run := service.runs.get(effect.instance_id)) is not None:
                        run.grace_s = effect.grace_s
                        self._send_stop(run)
                case CancelInstance():
                    if (run := service.runs.get(effect.instance_id)) is not None:
                        self._cancel(service, run, "the service gave it up")
                case RoutesChanged():
                    # Later: it may post events, whose effects must not come before the rest of these.
                    asyncio.get_running_loop().call_soon(self.on_routes, service)
                case ServiceGone():
                    self._set_timer(service)
                    self.on_gone(service)
                case _:
                    assert_never(effect)
        if effects:
            service.wake()
        self._set_timer(service)

    def _start(self, service: ServiceEntry, instance_id: str) -> None:
        instance = service.machine.instances[instance_id]
        try:
            entry = instance_runs.start_run(self._orchestrator, service, instance, self._function)
        except LatticeError as error:
            failure = instance_runs.refusal(error)
            log.warning("an instance is refused: %s", error.message, extra={"service": service.name})
            loop = asyncio.get_running_loop()
            loop.call_soon(self.post, service, InstanceEnded(instance_id, failure))
            return
        service.runs[instance_id] = InstanceRun(entry)
        self._instances[entry.key] = service, instance_id
        entry.on_effects = lambda effects: asyncio.get_running_loop().call_soon(self._observe, entry, tuple(effects))

    def _send_stop(self, run: InstanceRun) -> None:
        if run.control is not None and run.grace_s is not None:
            self._answer(answers.answered(run.control, {"grace_s": run.grace_s}))
            run.control = None

    def _cancel(self, service: ServiceEntry, run: InstanceRun, reason: str) -> None:
        self._orchestrator.cancel_run(id_of(run.entry.key), reason, Reach(service.tenant))

    def _observe(self, entry: RunEntry, effects: Sequence[object]) -> None:
        """Take the facts of the run of an instance."""
        if entry.key not in self._instances:
            return
        service, instance_id = self._instances[entry.key]
        for effect in effects:
            match effect:
                case TaskStarted():
                    self.post(service, InstanceStarted(instance_id, effect.node_id, effect.node_ip))
                case TaskSucceeded() | TaskFailed() | TaskCancelled() | TaskRetrying():
                    run = service.runs.pop(instance_id)
                    failure = run.failure or instance_runs.end_of(service, instance_id, effect)
                    self.post(service, InstanceEnded(instance_id, failure))
                case RunFinished():
                    # It is the last fact, whereas the run may have ended before its earlier facts are taken.
                    del self._instances[entry.key]
                    self._orchestrator.ended.note_read(entry)
                case _:
                    pass

    # Timers.

    def _set_timer(self, service: ServiceEntry) -> None:
        if service.timer is not None:
            service.timer.cancel()
            service.timer = None
        machine = service.machine
        deadline = None if machine.is_gone else machine.next_deadline()
        if deadline is not None:
            delay_s = max(0.0, deadline - time.monotonic())
            service.timer = asyncio.get_running_loop().call_later(delay_s, self._tick, service)

    def _tick(self, service: ServiceEntry) -> None:
        service.timer = None
        self._perform(service, service.machine.tick(time.monotonic()))
