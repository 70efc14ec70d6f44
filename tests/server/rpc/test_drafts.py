"""Graphs in parts: runs and workflows of drafts, repeated parts, and the end of a draft."""

import asyncio
from collections.abc import Sequence
from contextlib import closing

import pytest
from grpc import StatusCode as Code
from lattice.v1 import cluster_pb2, run_pb2, task_pb2, workflow_pb2

from lattice_server.core.errors import ExhaustedError, NotFoundError
from lattice_server.core.model import Artifact, Function, Payload, TaskSpec
from lattice_server.core.tenancy import UNNAMED
from lattice_server.engine.stores.artifact_store import ArtifactStore
from lattice_server.engine.stores.usage import Bound
from lattice_server.engine.workflows.draft_graphs import SPEC_BYTES, DraftGraphs
from tests.server.rpc.callers import Caller, fresh, function, graph, output, refused, run, task

CHAIN = [task("t0"), *(task(f"t{number}", inputs={"x": output(f"t{number - 1}")}) for number in range(1, 7))]
CODE = {"work": function()}


def part(caller: Caller, draft_id: str, tasks: Sequence[task_pb2.TaskSpec] = (), **more: object) -> int:
    """Send a part; return the revision after it."""
    request = workflow_pb2.AddTasksRequest(draft_id=draft_id, tasks=tasks, **more)  # type: ignore[arg-type]
    return caller.workflows.AddTasks(request).revision


def spec(draft_id: str, *tasks: task_pb2.TaskSpec, **more: object) -> workflow_pb2.WorkflowSpec:
    """Return the rest of a draft."""
    return workflow_pb2.WorkflowSpec(draft_id=draft_id, tasks=tasks, **more)  # type: ignore[arg-type]


def request_of(run_id: str, source: workflow_pb2.WorkflowSpec) -> workflow_pb2.RunWorkflowRequest:
    """Return a request that runs a workflow."""
    return workflow_pb2.RunWorkflowRequest(run_id=run_id, workflow=source)


def test_a_graph_in_parts_runs_as_one(busy: Caller) -> None:
    draft_id = fresh("draft")
    assert part(busy, draft_id, functions=CODE) == 1
    # Tasks may refer to those still to come.
    assert part(busy, draft_id, CHAIN[4:]) == 2
    assert part(busy, draft_id, CHAIN[1:4]) == 3
    execute = workflow_pb2.ExecuteWorkflowRequest(run=request_of("", spec(draft_id, CHAIN[0])))
    accepted, ended = busy.workflows.ExecuteWorkflow(execute, timeout=60)
    assert accepted.accepted.run.task_counts.total == len(CHAIN)
    assert ended.ended.run.state == run_pb2.RUN_STATE_SUCCEEDED
    assert [final.task_id for final in ended.ended.final_tasks] == ["t6"]


def test_run_is_the_same_when_its_graph_is_sent_in_parts(idle: Caller) -> None:
    run_id, draft_id = fresh(), fresh("draft")
    whole = workflow_pb2.WorkflowSpec(functions=CODE, tasks=CHAIN, display_name="n")
    assert idle.workflows.RunWorkflow(request_of(run_id, whole)).created
    part(idle, draft_id, CHAIN[:3], functions=CODE)
    rest = spec(draft_id, *CHAIN[3:], display_name="n")
    assert not idle.workflows.RunWorkflow(request_of(run_id, rest)).created
    assert not idle.workflows.RunWorkflow(request_of(run_id, rest)).created, "the draft was used up"
    other = fresh("draft")
    part(idle, other, CHAIN[1:3], functions=CODE)
    with refused(Code.ALREADY_EXISTS, "RUN_ID_CONFLICT"):
        idle.workflows.RunWorkflow(request_of(run_id, spec(other, *CHAIN[3:], CHAIN[0], display_name="n")))


@pytest.mark.parametrize(
    ("tasks", "reason"),
    [
        ([task("a", after=["c"]), task("b", after=["a"]), task("c", after=["b"])], "WORKFLOW_CYCLE"),
        ([task("a"), task("b", after=["ghost"]), task("c")], "INVALID_WORKFLOW"),
        ([task("a"), task("b"), task("a")], "INVALID_WORKFLOW"),
        ([task("a"), task("b"), task("c", inputs={"x": output("a", "no")})], "INVALID_WORKFLOW"),
    ],
)
def test_refusal_is_the_same_when_the_graph_is_sent_in_parts(
    idle: Caller, tasks: list[task_pb2.TaskSpec], reason: str
) -> None:
    with refused(Code.INVALID_ARGUMENT, reason) as whole:
        run(idle, *tasks)
    draft_id = fresh("draft")
    for one in tasks[:-1]:
        part(idle, draft_id, [one], functions=CODE)
    for source in (spec(draft_id, tasks[-1]), spec(draft_id, tasks[-1])):
        with refused(Code.INVALID_ARGUMENT, reason) as parts:
            idle.workflows.RunWorkflow(request_of(fresh(), source))
        assert (parts.message, parts.violations, parts.metadata) == (whole.message, whole.violations, whole.metadata)


def test_part_is_added_once_when_it_is_repeated(idle: Caller) -> None:
    draft_id = fresh("draft")
    request = workflow_pb2.AddTasksRequest(
        draft_id=draft_id, tasks=[task("a")], functions=CODE, request_id=fresh("request"), expected_revision=0
    )
    revisions = {idle.workflows.AddTasks(request).revision for _ in range(3)}
    assert revisions == {1}
    answer = idle.workflows.RunWorkflow(request_of("", spec(draft_id)))
    assert answer.run.task_counts.total == 1


def test_part_is_refused_when_it_is_out_of_order(idle: Caller) -> None:
    draft_id = fresh("draft")
    part(idle, draft_id, [task("a")], functions=CODE, expected_revision=0)
    for revision in (0, 2):
        with refused(Code.ABORTED, "REVISION_MISMATCH") as refusal:
            part(idle, draft_id, [task("b")], expected_revision=revision)
        assert refusal.metadata == {"revision": "1"}


def test_a_draft_is_not_run_twice(idle: Caller) -> None:
    draft_id = fresh("draft")
    part(idle, draft_id, [task("a")], functions=CODE)
    run_id = fresh()
    assert idle.workflows.RunWorkflow(request_of(run_id, spec(draft_id))).created
    assert not idle.workflows.RunWorkflow(request_of(run_id, spec(draft_id))).created
    with refused(Code.NOT_FOUND, "DRAFT_NOT_FOUND"):
        idle.workflows.RunWorkflow(request_of(fresh(), spec(draft_id)))
    with refused(Code.ALREADY_EXISTS, "WORKFLOW_ID_CONFLICT"):
        part(idle, draft_id, [task("b")])


def test_draft_stays_when_its_run_is_refused(idle: Caller) -> None:
    draft_id = fresh("draft")
    part(idle, draft_id, [task("a")], functions=CODE)
    with refused(Code.INVALID_ARGUMENT, "INVALID_WORKFLOW"):
        idle.workflows.RunWorkflow(request_of(fresh(), spec(draft_id, task("b", after=["ghost"]))))
    assert idle.workflows.RunWorkflow(request_of(fresh(), spec(draft_id, task("b", after=["a"])))).created


def test_an_unknown_draft_is_not_found(idle: Caller) -> None:
    for source in (spec("ghost"), spec("ghost", task("a"), functions=CODE)):
        with refused(Code.NOT_FOUND, "DRAFT_NOT_FOUND") as refusal:
            idle.workflows.RunWorkflow(request_of(fresh(), source))
        assert refusal.metadata == {"draft_id": "ghost"}


def test_part_is_refused_when_a_name_has_another_function(idle: Caller) -> None:
    draft_id = fresh("draft")
    part(idle, draft_id, functions=CODE)
    with refused(Code.ALREADY_EXISTS, "WORKFLOW_ID_CONFLICT"):
        part(idle, draft_id, functions={"work": function("fail")})
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD"):
        part(idle, draft_id, [task("a", function="ghost")])


def test_a_draft_is_stored_as_a_workflow(busy: Caller) -> None:
    draft_id, workflow_id = fresh("draft"), fresh("workflow")
    part(busy, draft_id, CHAIN[:4], functions=CODE)
    request = workflow_pb2.CreateWorkflowRequest(workflow_id=workflow_id, spec=spec(draft_id, *CHAIN[4:]))
    assert busy.workflows.CreateWorkflow(request).created
    assert not busy.workflows.CreateWorkflow(request).created, "a repetition finds what was stored"
    found = busy.workflows.GetWorkflow(workflow_pb2.GetWorkflowRequest(workflow_id=workflow_id)).workflow.spec
    assert [one.task_id for one in found.tasks] == [one.task_id for one in CHAIN]
    assert {one.function for one in found.tasks} == {"work"} == set(found.functions)
    assert found.functions["work"].digest.startswith("sha256:")
    assert not found.draft_id
    request_again = workflow_pb2.RunWorkflowRequest(workflow_id=workflow_id)
    execute = workflow_pb2.ExecuteWorkflowRequest(run=request_again)
    *_, ended = busy.workflows.ExecuteWorkflow(execute, timeout=60)
    assert ended.ended.run.state == run_pb2.RUN_STATE_SUCCEEDED


def test_tasks_of_a_draft_are_added_to_a_run(idle: Caller) -> None:
    draft_id, run_id = fresh("draft"), run(idle, task("first")).run.run_id
    part(idle, draft_id, [task("a", after=["first"]), task("b", after=["c"])], functions=CODE)
    request = workflow_pb2.AddTasksRequest(run_id=run_id, source_draft_id=draft_id, tasks=[task("c", after=["a"])])
    assert idle.workflows.AddTasks(request).revision == 2
    shown = idle.workflows.GetRunGraph(workflow_pb2.GetRunGraphRequest(run_id=run_id)).tasks
    assert [(one.task_id, list(one.predecessor_task_ids)) for one in shown] == [
        ("first", []),
        ("a", ["first"]),
        ("b", ["c"]),
        ("c", ["a"]),
    ]
    with refused(Code.INVALID_ARGUMENT, "INVALID_FIELD") as refusal:
        part(idle, fresh("draft"), source_draft_id=draft_id)
    assert list(refusal.violations) == ["source_draft_id"]


def test_draft_is_refused_when_it_exceeds_the_limits_of_a_run(idle: Caller) -> None:
    limits = idle.cluster.GetServerInfo(cluster_pb2.GetServerInfoRequest()).limits
    with closing(ArtifactStore()) as store:
        drafts = DraftGraphs(store, max_tasks=limits.run_tasks)
        with pytest.raises(ExhaustedError) as caught:
            drafts.expect("d", "", None, 1, limits.run_tasks + 1)
    assert caught.value.reason == "RUN_TOO_LARGE"


def test_draft_stays_when_it_is_only_validated(idle: Caller) -> None:
    draft_id = fresh("draft")
    part(idle, draft_id, CHAIN[:3], functions=CODE)
    request = workflow_pb2.CreateWorkflowRequest(spec=spec(draft_id, *CHAIN[3:]), validate_only=True)
    assert not idle.workflows.CreateWorkflow(request).created
    assert idle.workflows.RunWorkflow(request_of(fresh(), spec(draft_id))).created


def test_one_run_starts_when_two_equal_requests_are_concurrent(idle: Caller) -> None:
    # Large enough to be taken in slices, so that both are under way at once.
    tasks = [task(f"t{number}") for number in range(3000)]
    request = request_of(fresh(), graph(*tasks))
    futures = [idle.workflows.RunWorkflow.future(request, timeout=60) for _ in range(3)]
    assert sorted(future.result().created for future in futures) == [False, False, True]


# What becomes of a draft that is left.


def with_artifact(store: ArtifactStore) -> tuple[TaskSpec, Artifact]:
    """Return a task with a large input."""
    artifact = Artifact("0" * 64, 5, "head")
    store.hold([artifact])
    return TaskSpec("t", Function("f", False, None), inputs={"x": Payload("application/json", artifact)}), artifact


def test_draft_is_dropped_with_its_code_when_no_call_names_it() -> None:
    async def scenario() -> None:
        store = ArtifactStore()
        drafts = DraftGraphs(store, 10, Bound(100 + SPEC_BYTES), ttl_s=0.01)
        spec, artifact = with_artifact(store)
        drafts.add("d", {}, [spec], 100, None, UNNAMED)
        store.release([artifact])
        assert store.held(artifact.artifact_id) is not None
        with pytest.raises(ExhaustedError):
            drafts.expect("other", "", None, 1, 1)
        while len(drafts):
            await asyncio.sleep(0.005)
        assert store.held(artifact.artifact_id) is None
        drafts.expect("other", "", None, 1, 1)
        with pytest.raises(NotFoundError):
            drafts.get("d")
        store.close()

    asyncio.run(scenario())


def test_draft_holds_no_code_when_it_was_used() -> None:
    async def scenario() -> None:
        store = ArtifactStore()
        drafts = DraftGraphs(store, 10, Bound(100 + SPEC_BYTES))
        spec, artifact = with_artifact(store)
        drafts.add("d", {}, [spec], 100, "print", UNNAMED)
        store.release([artifact])
        drafts.use_up("d")
        assert store.held(artifact.artifact_id) is None
        drafts.expect("other", "", None, 100, 1)
        assert (drafts.get("d").tasks, drafts.get("d").print_) == ([], "print")
        store.close()

    asyncio.run(scenario())


def test_draft_is_refused_when_drafts_reach_their_limit() -> None:
    async def scenario() -> None:
        store = ArtifactStore()
        drafts = DraftGraphs(store, 10, Bound(100), max_drafts=2)
        for name in ("a", "b"):
            drafts.add(name, {}, [], 0, None, UNNAMED)
        with pytest.raises(ExhaustedError) as caught:
            drafts.expect("c", "", None, 0, 0)
        assert (caught.value.reason, caught.value.retry_after_s) == ("QUEUE_FULL", 1.0)
        drafts.expect("a", "", 1, 0, 0)
        for name in ("a", "b"):
            drafts.use_up(name)
        for name in ("c", "d"):
            drafts.expect(name, "", None, 0, 0)
            drafts.add(name, {}, [], 0, None, UNNAMED)
            drafts.use_up(name)
        assert len(drafts) == 2, "of those that were used the oldest go first"
        store.close()

    asyncio.run(scenario())
