"""The transition tables of runs, tasks, leases, nodes and sessions."""

from collections.abc import Mapping, Set
from enum import Enum
from typing import Any

import pytest

from lattice_server.core.messages import WorkerDetached, WorkerLost
from lattice_server.core.states import (
    LEASE_TRANSITIONS,
    NODE_TRANSITIONS,
    RUN_TRANSITIONS,
    SESSION_TRANSITIONS,
    TASK_TRANSITIONS,
    InvalidTransition,
    LeaseState,
    NodeState,
    RunState,
    SessionState,
    TaskState,
    transition,
)
from tests.server.core.scenes import Scene, node, ready

TABLES: list[tuple[type[Enum], Mapping[Any, Set[Any]]]] = [
    (RunState, RUN_TRANSITIONS),
    (TaskState, TASK_TRANSITIONS),
    (LeaseState, LEASE_TRANSITIONS),
    (NodeState, NODE_TRANSITIONS),
    (SessionState, SESSION_TRANSITIONS),
]


@pytest.mark.parametrize(("states", "table"), TABLES)
def test_an_unlisted_transition_raises_and_names_both_states(states: type[Enum], table: Mapping[Any, Set[Any]]) -> None:
    assert table.keys() == set(states)
    for old in states:
        for new in states:
            if new in table[old]:
                assert transition("run", "r", old, new, table) is new
            else:
                with pytest.raises(InvalidTransition, match=f"run r: {old.name} cannot become {new.name}"):
                    transition("run", "r", old, new, table)


def test_states_follow_a_lease_and_its_node_when_the_worker_detaches_and_is_lost() -> None:
    scene = Scene(node())
    scene.tell(ready("a"))
    (lease,), (one,) = scene.machine.leases.values(), scene.machine.nodes.values()
    states = [(lease.state, one.state, one.session)]
    scene.start("a")
    scene.tell(WorkerDetached(one.session_id), at=1.0)
    states.append((lease.state, one.state, one.session))
    scene.tell(WorkerLost("worker-of-n", "killed"), at=2.0)
    states.append((lease.state, one.state, one.session))
    assert states == [
        (LeaseState.ASSIGNED, NodeState.READY, SessionState.CONNECTED),
        (LeaseState.STARTED, NodeState.READY, SessionState.DETACHED),
        (LeaseState.RELEASED, NodeState.REMOVED, SessionState.ENDED),
    ]
