"""Owns the tie of a run to its callers. Rule: a run that no call has held for the grace time is cancelled."""

from lattice_server.core.run.run import Effect, Run


class Tether:
    """The machine of the calls that hold one run, beside that of the run; the orchestrator's thread owns it."""

    def __init__(self, run: Run, grace_s: float, now: float) -> None:
        self._run = run
        self._grace_s = grace_s
        self._calls = 0
        self._left_at: float | None = now

    def hold(self, grace_s: float) -> None:
        """Note that a call holds the run; it counts as gone `grace_s` seconds after the last one has ended."""
        self._grace_s = grace_s
        self._calls += 1
        self._left_at = None

    def leave(self, now: float) -> None:
        """Note that a call that held the run has ended."""
        self._calls -= 1
        self._left_at = None if self._calls else now

    def next_deadline(self) -> float | None:
        """Return when `tick` is due next, or None."""
        return None if self._left_at is None or self._run.is_terminal else self._left_at + self._grace_s

    def tick(self, now: float) -> list[Effect]:
        """Cancel the run if no call has held it for too long."""
        deadline = self.next_deadline()
        if deadline is None or now < deadline:
            return []
        self._left_at = None
        return self._run.cancel(f"its caller was disconnected for {self._grace_s:g} s", now)

    def check(self) -> None:
        """Assert every invariant; tests call it after each step."""
        assert self._calls >= 0, "a call left twice"
        assert not (self._calls and self._left_at is not None), "a run is held and has no caller"
