"""Random histories of one run whose server is killed and started again: only the facts of the run survive."""

from hypothesis.stateful import rule

from lattice_server.core.messages import RunStarted
from lattice_server.core.run.limits import Bounds
from lattice_server.core.run.open_run import OpenRun
from tests.server.core.restoring import made_again
from tests.server.core.run_histories import RunHistories


class RestartHistories(RunHistories):
    """One run over several lives of its server."""

    @rule()
    def restarts(self) -> None:
        """Forget all but the facts, make the run again, and continue it."""
        self.to_scheduler.clear()
        self.to_run.clear()
        self.held.clear()
        self.asked.clear()
        assert isinstance(self.facts[0], RunStarted)
        facts = [(self.now, fact) for fact in self.facts]
        run, restoration = made_again(self.run, facts, bounds=Bounds(60, 6, 2), slice_tasks=self.slice_tasks)
        self.perform(run.resume(restoration, self.now))
        self.run = run
        if self.caller is not None:
            self.caller = OpenRun(self.run, 5.0, self.now, max_questions=3)
