"""Owns the services of all tenants, and the waiters and users of each, on the main thread.

Rule: a service is found by its name within its tenant; a task reaches the services of its own tenant only.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial

from lattice_server.core.errors import ExhaustedError, LatticeError, NotFoundError
from lattice_server.core.messages import (
    QuestionAsked,
    SchedulerEvent,
    ServiceNeeded,
    TaskCancelled,
    TaskFailed,
    TaskRetrying,
    TaskSucceeded,
)
from lattice_server.core.model import Bundle, Function, NodeSpec
from lattice_server.core.services.demand import SHRINK_DELAY_S
from lattice_server.core.services.messages import Defined, NodesChanged, Scaled, Stopped, UseChanged
from lattice_server.core.services.model import ServiceSpec, ServiceState
from lattice_server.core.services.service import Service
from lattice_server.core.tenancy import SEPARATOR, Reach, Shelf, key_of
from lattice_server.engine.orchestrator import Orchestrator
from lattice_server.engine.ports import ServiceObserver
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.services import answers
from lattice_server.engine.services.addresses import Addresses
from lattice_server.engine.services.driver import ServiceDriver
from lattice_server.engine.services.entry import ServiceEntry, Use, use_of
from lattice_server.engine.services.models import Models
from lattice_server.engine.services.task_needs import TaskNeeds

MAX_SERVICES = 1000  # Of one tenant.
SETTLED = frozenset({ServiceState.READY, ServiceState.DEGRADED, ServiceState.FAILED, ServiceState.STOPPING})
AttemptEnd = TaskSucceeded | TaskFailed | TaskCancelled | TaskRetrying

log = logging.getLogger(__name__)


class Services:
    """The services. `function` is the function of an instance's task, `gateway` the function of a gateway's task.

    `post` sends events to the scheduler. `interface` is the address of this machine for other machines.
    """

    def __init__(
        self,
        orchestrator: Orchestrator,
        function: Function,
        gateway: Function,
        post: Callable[[Sequence[SchedulerEvent]], None],
        interface: str,
        shrink_delay_s: float = SHRINK_DELAY_S,
    ) -> None:
        self._shrink_delay_s = shrink_delay_s
        self._orchestrator = orchestrator
        self._services: Shelf[ServiceEntry] = Shelf()
        self.observers: list[ServiceObserver] = []
        self._driver = ServiceDriver(orchestrator, function, self.observers)
        services = self._services.values
        self._models = Models(orchestrator, gateway, services, self._answer_all, self.observers, interface)
        self._driver.on_routes = self._note_routes
        self._driver.on_gone = self._forget
        self._addresses = Addresses(orchestrator, self._models)
        self._needs = TaskNeeds(post)
        self._used: dict[str, set[tuple[ServiceEntry, Use]]] = {}  # By the key of a run.
        orchestrator.events.on_question = self._ask
        orchestrator.on_nodes = self._know_nodes
        orchestrator.on_needed = lambda needed: asyncio.get_running_loop().call_soon(self._note_needed, needed)
        orchestrator.requirements.has_service = lambda name, tenant: self.find(name, Reach(tenant)) is not None

    def __len__(self) -> int:
        return len(self._services)

    def start(self, spec: ServiceSpec, tenant: str, bundle: Bundle | None) -> tuple[ServiceEntry, bool]:
        """Start a service, or give it another definition; the flag tells whether that changed anything.

        Raises ExhaustedError when the tenant has too many services.
        """
        key = key_of(spec.name, tenant)
        entry = self._services.get(key)
        if entry is None:
            if sum(found.tenant == tenant for found in self._services.values()) >= MAX_SERVICES:
                text = f"the tenant has {MAX_SERVICES} services; stop one first"
                raise ExhaustedError("TOO_MANY_SERVICES", text)
            entry = self._services[key] = ServiceEntry(Service(spec, self._shrink_delay_s), tenant, bundle)
            self._driver.begin(entry)
            self._models.update()
            self._needs.tell(entry)
            self._note_use(entry)
            return entry, True
        entry.bundle = bundle
        before = entry.machine.revision
        self._driver.post(entry, Defined(spec))
        return entry, entry.machine.revision != before

    def find(self, name: str, reach: Reach) -> ServiceEntry | None:
        """Return a service; None when there is none."""
        return self._services.find(name, reach)

    def get(self, name: str, reach: Reach) -> ServiceEntry:
        """Return a service. Raises NotFoundError."""
        entry = self.find(name, reach)
        if entry is None:
            raise NotFoundError("SERVICE_NOT_FOUND", f"there is no service {name!r}", metadata={"name": name})
        return entry

    def all(self) -> Collection[ServiceEntry]:
        """Return the services of all tenants."""
        return self._services.values()

    def within(self, reach: Reach) -> list[ServiceEntry]:
        """Return the services within reach, by name."""
        found = (entry for entry in self._services.values() if reach.covers(entry.tenant))
        return sorted(found, key=lambda entry: (entry.name, entry.tenant))

    def scale(self, entry: ServiceEntry, replicas: int, max_replicas: int) -> None:
        """Change how many instances a service has."""
        self._driver.post(entry, Scaled(replicas, max_replicas))

    def stop(self, entry: ServiceEntry) -> None:
        """Stop a service; it is forgotten when its last instance has ended."""
        self._driver.post(entry, Stopped())

    async def wait_started(self, entry: ServiceEntry, wait_s: float) -> None:
        """As `wait`; also until the program of a definition that was never ready ends by itself."""
        starts = entry.machine.starts
        await self.wait(entry, wait_s, partial(starts.has_told, starts.failures))

    async def wait(self, entry: ServiceEntry, wait_s: float, is_over: Callable[[], bool] = lambda: False) -> None:
        """Wait until a service has an instance that is ready, or has failed, or `is_over`. This uses it."""
        if wait_s <= 0 or entry.machine.state in SETTLED:
            return
        entry.calls += 1
        self._note_use(entry)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    while not (entry.machine.state in SETTLED or entry.machine.is_gone or is_over()):
                        await entry.changed()
        finally:
            entry.calls -= 1
            self._note_use(entry)

    async def wait_gone(self, entry: ServiceEntry, wait_s: float) -> None:
        """Wait until the last instance of a stopped service has ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while not entry.machine.is_gone:
                    await entry.changed()

    def _note_needed(self, needed: ServiceNeeded) -> None:
        self._needs.note(needed)
        if (entry := self._services.get(needed.key)) is not None:
            self._note_use(entry)

    # Questions of tasks.

    def _ask(self, run: RunEntry, question: QuestionAsked) -> bool:
        if not question.name.startswith(answers.SYSTEM):
            return False
        # In turn: the facts of a run are taken from the event loop too, and one that was reported first comes first.
        asyncio.get_running_loop().call_soon(self._take_question, run, question)
        return True

    def _take_question(self, run: RunEntry, question: QuestionAsked) -> None:
        """Take a question of an instance, a gateway or a task; one whose value cannot be read is refused."""
        try:
            self._serve(run, question)
        except answers.QuestionFormError as error:
            self._orchestrator.answer(answers.refused(question, "QuestionError", str(error)))
        except Exception:
            # Its value has another form than the parts of it should have; an answer ends the wait for one.
            log.exception("a question named %s was not understood", question.name)
            text = f"the server did not understand the value of {question.name}"
            self._orchestrator.answer(answers.refused(question, "QuestionError", text))

    def _serve(self, run: RunEntry, question: QuestionAsked) -> None:
        if self._driver.serve(question) or self._models.serve(question):
            return
        content = answers.content_of(question)
        is_of_gateway = self._models.waits(question)
        if question.name not in {answers.ENDPOINT, answers.LLM} and not is_of_gateway:
            # An instance, or a gateway, that this server does not know ends by this.
            text = f"this server does not know who asks, or there is no question {question.name!r}"
            self._orchestrator.answer(answers.refused(question, "QuestionError", text))
            return
        name, _, tenant = str(content.get("name", "")).partition(SEPARATOR)
        reach = Reach(tenant if is_of_gateway else run.run.tenant)
        try:
            entry = self.get(name, reach)
        except LatticeError as error:
            known = ", ".join(found.name for found in self.within(reach)) or "none"
            text = f"{error.message}; this tenant has: {known}"
            self._orchestrator.answer(answers.refused(question, "ServiceNotFoundError", text))
            return
        spec = entry.machine.spec
        if (question.name == answers.LLM and not spec.engine) or (question.name == answers.ENDPOINT and spec.base_url):
            text = f"service {name!r} serves no model: use context.service"
            if spec.base_url:
                text = f"model {name!r} has no address in the cluster: use context.llm"
            self._orchestrator.answer(answers.refused(question, "ServiceNotFoundError", text))
            return
        if not is_of_gateway:
            self._used.setdefault(run.key, set()).add((entry, use_of(question)))
            run.on_effects = run.on_effects or partial(self._observe, run)
        entry.waiting[question.question_id] = question
        self._note_use(entry)
        self._answer_waiting(entry)

    def _note_routes(self, entry: ServiceEntry) -> None:
        if entry.machine.spec.engine:
            self._models.update()
        if not entry.machine.is_gone:
            self._needs.tell(entry)
        self._answer_waiting(entry)

    def _know_nodes(self, nodes: tuple[NodeSpec, ...]) -> None:
        # In turn, as all other facts.
        asyncio.get_running_loop().call_soon(self._leave_nodes, nodes)

    def _leave_nodes(self, nodes: tuple[NodeSpec, ...]) -> None:
        self._models.know(nodes)
        for entry in list(self._services.values()):
            self._driver.post(entry, NodesChanged(frozenset(node.node_id for node in nodes)))

    def _answer_all(self) -> None:
        """Answer the tasks that waited for a gateway."""
        for entry in list(self._services.values()):
            self._answer_waiting(entry)

    def _answer_waiting(self, entry: ServiceEntry) -> None:
        """Answer the tasks that wait for a service, if it is ready or has failed."""
        if self._addresses.answer(entry):
            self._note_use(entry)

    def _observe(self, run: RunEntry, effects: Sequence[object]) -> None:
        """End the uses of the attempts that ended."""
        ended = {(effect.task_id, effect.attempt) for effect in effects if isinstance(effect, AttemptEnd)}
        if not ended and not run.run.is_terminal:
            return
        uses = self._used.get(run.key, set())
        over = {found for found in uses if run.run.is_terminal or found[1][1:] in ended}
        uses -= over
        if not uses:
            self._used.pop(run.key, None)
            run.on_effects = None
        if over:
            asyncio.get_running_loop().call_soon(self._end_uses, over)

    def _end_uses(self, over: Collection[tuple[ServiceEntry, Use]]) -> None:
        self._models.revoke({use for _, use in over})
        for entry, use in over:
            entry.users.discard(use)
            asked = [name for name, found in entry.waiting.items() if use_of(found) == use]
            for name in asked:
                del entry.waiting[name]
            self._note_use(entry)

    def _note_use(self, entry: ServiceEntry) -> None:
        """Tell the machine how much a service is used."""
        if not entry.machine.is_gone:
            waiting, others = self._needs.count(entry)
            use = UseChanged(len(entry.waiting) + entry.calls + waiting, len(entry.users) + others)
            self._driver.post(entry, use)

    def _forget(self, entry: ServiceEntry) -> None:
        del self._services[key_of(entry.name, entry.tenant)]
        self._needs.forget(entry)
        self._models.update()
        self._answer_waiting(entry)
        entry.wake()
