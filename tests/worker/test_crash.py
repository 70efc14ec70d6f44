"""What kind of failure the end of a runner is."""

import signal

import pytest

from lattice_worker.machine import cgroup
from lattice_worker.pool.crash import Crash


def kind_of(crash: Crash, status: int = -signal.SIGKILL) -> str:
    return str(crash._failure(status)["failure"]["kind"])


def test_memory_ran_out_only_if_the_kernel_killed_since_the_process_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "own_oom_kills", lambda: 4)
    crash = Crash()
    assert kind_of(crash) == "crashed"
    monkeypatch.setattr(cgroup, "own_oom_kills", lambda: 5)
    assert kind_of(crash) == "out_of_memory"
    assert kind_of(crash, -signal.SIGTERM) == kind_of(crash, 1) == "crashed"
    assert kind_of(Crash()) == "crashed"


@pytest.mark.parametrize("cause", ["is_blocked", "has_disconnected"])
def test_a_process_that_the_agent_killed_did_not_run_out_of_memory(monkeypatch: pytest.MonkeyPatch, cause: str) -> None:
    monkeypatch.setattr(cgroup, "own_oom_kills", lambda: 4)
    crash = Crash()
    setattr(crash, cause, True)
    monkeypatch.setattr(cgroup, "own_oom_kills", lambda: 5)
    assert kind_of(crash) == "crashed"
