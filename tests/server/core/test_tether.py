"""Runs that are cancelled when no call has held them for a grace time."""

from typing import Any

from lattice_server.core.messages import CancelRequested, RunCancelling
from lattice_server.core.run.tether import Tether
from lattice_server.core.states import RunState
from tests.server.core.graphs import task
from tests.server.core.run_scenes import RunScene


def tied(grace_s: float = 5.0) -> tuple[RunScene, Tether]:
    scene = RunScene(task("a"))
    return scene, Tether(scene.run, grace_s, 0.0)


def kinds(effects: list[Any]) -> list[type]:
    return [type(effect) for effect in effects]


def test_a_run_is_cancelled_once_no_call_has_held_it_for_the_grace_time() -> None:
    scene, tether = tied()
    tether.hold(5.0)
    assert tether.next_deadline() is None
    assert tether.tick(100.0) == []
    tether.hold(3.0)
    tether.leave(100.0)
    assert tether.next_deadline() is None, "another call holds it"
    tether.leave(101.0)
    assert tether.next_deadline() == 104.0, "the newest call says how long"
    assert tether.tick(103.9) == []
    tether.check()
    effects = scene.take(tether.tick(104.0))
    assert kinds(effects) == [RunCancelling, CancelRequested]
    assert effects[0].failure.message == "its caller was disconnected for 3 s"
    assert tether.next_deadline() is None


def test_tied_run_is_cancelled_when_no_call_holds_it_within_the_grace_time() -> None:
    scene, tether = tied()
    assert tether.next_deadline() == 5.0
    tether.hold(5.0)
    tether.leave(2.0)
    tether.hold(5.0)
    assert tether.tick(50.0) == []
    tether.leave(50.0)
    scene.take(tether.tick(55.0))
    assert scene.run.state is RunState.CANCELLING


def test_a_run_that_has_ended_is_not_cancelled() -> None:
    scene, tether = tied()
    tether.hold(5.0)
    scene.succeed("a")
    tether.leave(9.0)
    assert tether.next_deadline() is None
    assert tether.tick(99.0) == []
    tether.check()
