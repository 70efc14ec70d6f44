"""Owns the state of a run, and the effects that its machine returns next."""

from dataclasses import dataclass, field

from lattice_server.core.messages import CancelRequested, Fact, RunFinished, TaskReady
from lattice_server.core.model import Failure, FailureKind
from lattice_server.core.states import RUN_TERMINAL, RUN_TRANSITIONS, RunState, transition

Effect = Fact | TaskReady | CancelRequested


@dataclass(slots=True, eq=False)
class RunStatus:
    """The state of one run. An open run ends only after it is closed."""

    run_id: str
    is_open: bool
    state: RunState = RunState.RUNNING
    failure: Failure | None = None
    started_at: float = 0.0
    _effects: list[Effect] = field(default_factory=list)

    @property
    def is_running(self) -> bool:
        """Whether tasks may start."""
        return self.state is RunState.RUNNING

    @property
    def is_terminal(self) -> bool:
        """Whether the run has ended."""
        return self.state in RUN_TERMINAL

    def become(self, state: RunState) -> None:
        """Change the state. Raises InvalidTransition."""
        self.state = transition("run", self.run_id, self.state, state, RUN_TRANSITIONS)

    def finish(self, unread_signals: tuple[str, ...]) -> None:
        """End the run: its failure decides how."""
        if self.failure is None:
            self.become(RunState.SUCCEEDED)
        elif self.failure.kind is FailureKind.CANCELLED:
            self.become(RunState.CANCELLED)
        else:
            self.become(RunState.FAILED)
        self.emit(RunFinished(self.state, self.failure, unread_signals))

    def emit(self, effect: Effect) -> None:
        """Add an effect."""
        self._effects.append(effect)

    def take_effects(self) -> list[Effect]:
        """Return the effects since the last call."""
        effects, self._effects = self._effects, []
        return effects
