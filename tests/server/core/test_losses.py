"""Lost workers: which tasks are charged, which run alone afterwards, and which attempt numbers are used."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lattice_server.core import messages
from lattice_server.core.messages import Assign, AttemptInputs, ReasonKind, TaskRetrying
from lattice_server.core.model import (
    BatchPolicy,
    Binding,
    Capacity,
    Failure,
    FailureKind,
    FailurePolicy,
    Function,
    OutputRef,
    Resources,
    RetryPolicy,
    TaskSpec,
    WorkflowSpec,
)
from lattice_server.core.states import TaskState
from tests.examples import share
from tests.server.core.cluster import Cluster
from tests.server.core.graphs import SYNC, VALUE, hello, task
from tests.server.core.scenes import BROKEN, Scene, node, ready
from tests.server.core.test_sending import warmed
from tests.server.core.workers import Outcome

ASYNC = Function("sha256:async", is_async=True, definition=None)
LOST = messages.WorkerLost("worker-of-n", "killed")
GONE = Failure(FailureKind.WORKER_LOST, "gone")
ONE_LOSS = RetryPolicy(max_worker_losses=1)


def coroutine(task_id: str) -> messages.TaskReady:
    """Return an async task, which takes no CPU."""
    made = ready(task_id, resources=Resources(0.0))
    return replace(made, spec=replace(made.spec, function=ASYNC))


def returned(scene: Scene, task_id: str, reason: str = "") -> list[str]:
    """Let a worker return the newest lease of a task."""
    lease = scene.leases[task_id]
    return scene.tell(messages.LeaseReturned(lease.session_id, lease.lease_id, reason))


def retried(scene: Scene) -> dict[str, tuple[int, str]]:
    """Return the attempts that are tried again by the last step, and why."""
    found = [effect for effect in scene.effects if isinstance(effect, TaskRetrying)]
    assert all(effect.failure.kind is FailureKind.WORKER_LOST and effect.delay_s == 0 for effect in found)
    return {effect.task_id: (effect.attempt, effect.failure.message) for effect in found}


def number(scene: Scene, task_id: str) -> int:
    """Return the number of the newest attempt of a task that was handed out."""
    return next(a.attempt for a in scene.leases[task_id].attempts if a.task_id == task_id)


@pytest.mark.parametrize("is_started", [True, False])
def test_an_attempt_that_was_alone_on_a_lost_worker_is_charged(is_started: bool) -> None:
    scene = Scene(node())
    scene.tell(ready("a", retry=ONE_LOSS))
    if is_started:
        scene.start("a")
    scene.tell(LOST)
    assert scene.ends() == {"a": "failed"}


@pytest.mark.parametrize("other", [ready("b"), coroutine("b")])
def test_no_attempt_is_charged_when_several_were_on_a_lost_worker(other: messages.TaskReady) -> None:
    scene = Scene(node())
    scene.tell(ready("a", retry=ONE_LOSS), replace(other, spec=replace(other.spec, retry=ONE_LOSS)))
    scene.start("a", "b")
    scene.tell(LOST)
    assert retried(scene) == dict.fromkeys("ab", (1, "node 'n' was lost: killed"))
    assert {task.losses for task in scene.machine.tasks.values()} == {0}


@pytest.mark.parametrize("make", [ready, coroutine])
def test_each_task_of_a_lost_worker_runs_alone_on_its_node_afterwards(make: object) -> None:
    assert callable(make)
    scene = Scene(node())
    scene.tell(make("a"), make("b"))
    scene.tell(LOST)
    assert scene.tell(node("n"), make("c")) == ["a"]
    assert scene.tell(node("m")) == ["b"]
    assert scene.tell(make("d"), coroutine("e")) == []
    assert scene.succeed("a") == ["c", "d", "e"], "others meet again"
    assert scene.succeed("c", "d", "e") == []
    assert scene.succeed("b") == []


def test_a_task_that_runs_alone_waits_until_its_node_is_empty() -> None:
    on = {"node_selector": (("on", "m"),)}
    scene = Scene(node("n"), node("m", labels={"on": "m"}))
    scene.tell(ready("a", **on), ready("b", **on))
    scene.tell(messages.WorkerLost("worker-of-m", "killed"))
    scene.tell(node("m", labels={"on": "m"}))
    assert scene.leases["a"].session_id == scene.machine.nodes["m"].session_id
    assert [reason.message for reason in scene.why("b")][-1] == (
        "node 'm': another attempt is on it, and the task runs alone on its node because a worker was lost under it"
    )


def test_a_task_that_runs_alone_and_a_service_share_a_node() -> None:
    scene = Scene(node())
    scene.tell(ready("service", is_service=True, resources=Resources(0.0)), ready("a"), ready("b"))
    scene.tell(LOST)
    scene.tell(node("n"))
    assert scene.tell(ready("again", is_service=True, retry=ONE_LOSS)) == ["again"], "a service is not kept out"
    assert scene.succeed("a") == ["b"], "a service is not waited for"
    assert scene.tell(ready("c")) == []
    assert scene.succeed("b") == ["c"]


def test_a_lost_service_ends_and_is_not_run_alone() -> None:
    scene = Scene(node())
    scene.tell(ready("service", is_service=True, retry=ONE_LOSS), ready("a", retry=ONE_LOSS))
    scene.start("service", "a")
    scene.tell(LOST)
    assert scene.ends() == {"service": "failed", "a": "failed"}, "beside services alone is alone"


def test_no_task_is_sent_behind_a_service() -> None:
    scene = warmed()
    assert scene.tell(ready("service", is_service=True)) == ["service"]
    assert scene.tell(ready("other", is_service=True)) == []
    assert scene.tell(ready("after")) == []


def test_a_loss_of_a_draining_node_charges_no_attempt_and_none_runs_alone() -> None:
    scene = Scene(node())
    scene.tell(ready("a", retry=ONE_LOSS))
    scene.start("a")
    scene.tell(messages.DrainRequested("n"))
    scene.tell(LOST)
    assert retried(scene) == {"a": (1, "node 'n' was lost: killed")}
    assert scene.tell(node("m"), ready("b")) == ["a", "b"]


def test_a_drain_deadline_charges_no_attempt_and_none_runs_alone() -> None:
    scene = Scene(node())
    scene.tell(ready("a", retry=ONE_LOSS))
    scene.start("a")
    scene.tell(messages.DrainRequested("n", 0.0))
    assert list(retried(scene)) == ["a"]
    assert scene.tell(node("m"), ready("b")) == ["a", "b"]


def test_batch_members_run_alone_after_their_worker_was_lost() -> None:
    scene = Scene(node())
    scene.tell(*[ready(name, batch=BatchPolicy(3), retry=ONE_LOSS) for name in "abc"], ready("other"))
    scene.tell(LOST)
    found = scene.tell(node("n"))
    while scene.machine.tasks:
        found += scene.succeed(found[-1])
    assert found == ["a", "b", "c", "other"]


def test_only_the_batch_member_that_ends_its_workers_is_charged() -> None:
    scene = Scene(node())
    scene.tell(*[ready(name, batch=BatchPolicy(4), retry=ONE_LOSS) for name in ("a", "b", "poison", "d")])
    ended: dict[str, str] = {}
    while scene.machine.tasks:
        scene.tell(node("n"))
        lease = next(iter(scene.machine.leases.values()))
        names = [member.ready.spec.task_id for member in lease.tasks]
        if "poison" in names:
            scene.tell(LOST)
        else:
            scene.succeed(names[0])
        ended |= scene.ends()
    assert ended == {"a": "succeeded", "b": "succeeded", "poison": "failed", "d": "succeeded"}


def test_follower_does_not_count_against_running_alone_and_is_not_sent_along_again() -> None:
    scene = warmed()
    scene.tell(ready("a", retry=ONE_LOSS), ready("b", after="a", retry=ONE_LOSS))
    assert scene.leases["b"].after_lease_id
    scene.tell(LOST)
    assert scene.ends() == {}
    assert scene.tell(node("n", cpu=1)) == ["a"]
    assert scene.succeed("a", took=0.001) == ["b"]
    assert number(scene, "b") == 2, "the first may have begun"


def test_worker_lost_failure_is_charged_only_when_the_attempt_was_alone() -> None:
    scene = Scene(node())
    scene.tell(ready("a", retry=ONE_LOSS), ready("b"))
    assert scene.fail("a", GONE) == []
    assert scene.ends() == {}
    assert scene.succeed("b") == ["a"]
    scene.fail("a", GONE)
    assert scene.ends() == {"a": "failed"}


def test_attempts_a_worker_no_longer_knows_of_are_charged_only_when_alone() -> None:
    scene = Scene(node())
    scene.tell(ready("a", retry=ONE_LOSS), ready("b", retry=ONE_LOSS))
    session_id = scene.leases["a"].session_id
    forgotten = messages.WorkerHeartbeat(session_id, frozenset(), 99)
    assert scene.tell(forgotten) == ["a"]
    scene.tell(forgotten)
    assert scene.ends() == {"a": "failed"}


def test_started_lease_is_requeued_uncharged_when_it_is_returned() -> None:
    scene = Scene(node(cpu=2))
    scene.tell(ready("a", retry=ONE_LOSS), ready("b"))
    scene.start("a")
    reason = "the process it shared with other async tasks exited with status 3"
    for attempt in range(1, 10):
        assert returned(scene, "a", reason) == ["a"]
        assert retried(scene) == {"a": (attempt, reason)}
        assert number(scene, "a") == attempt + 1
        scene.start("a")
    (kept,) = [task for task in scene.machine.tasks.values() if task.ready.spec.task_id == "a"]
    assert (kept.losses, kept.failures) == (0, 0)


def test_a_returned_batch_runs_again_as_it_was() -> None:
    scene = Scene(node())
    scene.tell(*[ready(name, batch=BatchPolicy(3)) for name in "abc"])
    scene.fail("b", BROKEN)
    assert returned(scene, "a", "why") == ["a+c"]
    assert retried(scene) == dict.fromkeys("ac", (1, "why"))


def test_a_cancelled_task_whose_started_lease_is_returned_is_not_tried_again() -> None:
    scene = Scene(node())
    scene.tell(ready("a"))
    scene.start("a")
    scene.cancel("a")
    assert returned(scene, "a") == []
    assert scene.ends() == {"a": "cancelled"}


def test_a_number_is_used_again_only_when_its_worker_returned_it_unstarted() -> None:
    scene = Scene(node())
    scene.tell(ready("a"))
    assert returned(scene, "a") == ["a"]
    assert (number(scene, "a"), retried(scene)) == (1, {})
    scene.tell(ready("b"))
    scene.tell(LOST)
    scene.tell(node("n"))
    scene.succeed("a")
    assert [number(scene, name) for name in "ab"] == [2, 2]


def test_a_superseded_worker_is_a_lost_one() -> None:
    scene = Scene(node())
    scene.tell(ready("a"), ready("b"))
    scene.start("a")
    assert scene.tell(node("n")) == ["a"]
    assert number(scene, "a") == 2


# Waiting for an empty node.


@pytest.mark.parametrize("passing", [ready, coroutine])
def test_a_task_that_runs_alone_does_not_starve(passing: object) -> None:
    assert callable(passing)
    scene = Scene(node())
    scene.tell(ready("a"), ready("b"))
    scene.tell(LOST)
    scene.cancel("b")
    running = scene.tell(node("n"), *[replace(passing(f"first{n}"), priority=1) for n in range(3)])
    for count in range(100):
        if "a" in running:
            break
        running += scene.tell(passing(f"t{count}"))
        running += scene.succeed(running.pop(0), at=scene.now + 0.1)
    assert running == ["a"]
    assert 1.0 < scene.now < 3.0


def test_it_is_said_of_a_kept_node_that_a_task_is_to_run_alone_on_it() -> None:
    scene = Scene(node())
    scene.tell(ready("a"), ready("b"))
    scene.tell(LOST)
    scene.cancel("b")
    scene.tell(node("n"), *[ready(name, priority=1) for name in "cd"])
    scene.tell(ready("e"), at=0.5)
    scene.tell(ready("f"), at=2.0)
    text = "node 'n' is kept for a task that waited longer and runs alone on it"
    assert (ReasonKind.TURN, text) in [(reason.kind, reason.message) for reason in scene.why("f")]


def test_tasks_that_run_alone_and_others_all_get_their_turn_on_one_node() -> None:
    scene = Scene(node())
    shapes = [Resources(1.0), Resources(2.0), Resources(0.0)]
    scene.tell(*[ready(f"x{n}", resources=shapes[n % 3], tenant=str(n % 2)) for n in range(4)], coroutine("y"))
    scene.tell(LOST)
    running = scene.tell(node("n"), *[ready(f"z{n}") for n in range(8)])
    while running:
        running += scene.succeed(running.pop(0), at=scene.now + 0.7)
    assert not scene.machine.tasks


# Whole clusters.


class Culprits:
    """A run some of whose tasks end the worker they run on, on workers that are started again; from one seed."""

    def __init__(self, seed: int, latency_s: float) -> None:
        self.rng = rng = Random(seed)
        self.cluster = Cluster(self.behave, latency_s=latency_s)
        self.tasks = [self.task(f"t{number}") for number in range(rng.randint(2, 20))]
        self.culprits = {spec.task_id for spec in rng.sample(self.tasks, rng.randint(0, 2)) if not spec.inputs}
        self.begun: set[tuple[str, int]] = set()
        self.workers = 0

    def task(self, task_id: str) -> TaskSpec:
        """Return a task of any kind; some follow an earlier one."""
        rng = self.rng
        made = task(
            task_id,
            resources=Resources(rng.choice([0.0, 1.0, 1.0, 3.0])),
            retry=RetryPolicy(max_worker_losses=rng.randint(1, 3)),
            batch=rng.choice([None, None, BatchPolicy(4)]),
        )
        return replace(made, function=rng.choice([SYNC, ASYNC]))

    def play(self) -> None:
        """Let all of it end; assert that the culprits failed and that nothing else did."""
        rng = self.rng
        for node_id in rng.sample(["n1", "n2", "n3"], rng.randint(1, 3)):
            self.join(node_id)
        specs = list(self.tasks)
        for index, spec in enumerate(specs[1:], 1):
            source = rng.choice(specs[:index]).task_id
            if spec.task_id not in self.culprits and source not in self.culprits and rng.random() < 0.3:
                specs[index] = replace(spec, inputs={"x": OutputRef(source, "out")})
        workflow = WorkflowSpec(tuple(specs), failure_policy=FailurePolicy.FINISH_INDEPENDENT)
        run = self.cluster.start("r", workflow)
        self.cluster.go_on(lambda: run.is_terminal, most_s=10_000)
        failed = {task_id for task_id, record in run.tasks.items() if record.state is not TaskState.SUCCEEDED}
        assert failed == self.culprits
        for task_id in failed:
            failure = run.tasks[task_id].failure
            assert failure is not None
            assert failure.kind is FailureKind.WORKER_LOST

    def join(self, node_id: str) -> None:
        """Start a worker, unless the node has one."""
        if node_id in self.cluster.workers:
            return
        self.workers += 1
        capacity = Capacity(4.0, 1 << 30, slots=4, async_slots=4)
        self.cluster.join(replace(hello(node_id), worker_id=f"worker-{self.workers}", capacity=capacity))

    def behave(self, assign: Assign, attempt: AttemptInputs, inputs: Mapping[str, Binding]) -> Outcome:
        """Succeed, or end the worker, before or after its start could be told."""
        number = (attempt.task_id, attempt.attempt)
        assert number not in self.begun, "an attempt number runs twice"
        self.begun.add(number)
        seconds = self.rng.choice([0.0005, 0.001, 0.1, 1.0])
        if attempt.task_id not in self.culprits:
            return Outcome(seconds, {"out": VALUE})
        self.cluster.after(seconds / 2, lambda: self.kill(assign))
        return Outcome(1000.0, {"out": VALUE})

    def kill(self, assign: Assign) -> None:
        """End the worker that holds a lease, and start another in its place."""
        for node_id, worker in list(self.cluster.workers.items()):
            if worker.session_id == assign.session_id and assign.lease_id in worker.held():
                self.cluster.kill(node_id)
                self.cluster.after(self.rng.choice([0.01, 0.5]), partial(self.join, node_id))


@settings(max_examples=share(1200), deadline=None)
@given(seed=st.integers(0, 1 << 32), latency_s=st.sampled_from([0.0, 0.0005, 0.02]))
def test_tasks_that_end_their_workers_fail_and_no_other_does(seed: int, latency_s: float) -> None:
    Culprits(seed, latency_s).play()
