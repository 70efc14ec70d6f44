"""Owns the checks of a cluster: its nodes, the isolation they offer, and a queue that does not move.

Rule: they change nothing, and read a bounded number of runs and tasks.
"""

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence

from lattice.v1 import cluster_pb2, resources_pb2, run_pb2, task_pb2

from lattice_client.cli.findings import ERROR, OK, SKIPPED, WARNING, Finding
from lattice_client.cli.graph_rows import brief
from lattice_client.cli.progress import span
from lattice_client.cli.server_checks import Answer
from lattice_client.client import AsyncLatticeClient
from lattice_client.errors import LatticeError, NotFoundError, PermissionDeniedError

# A task that waits longer is worth a look.
LONG_WAIT_S = 60.0
SILENT_S = 30.0
MAX_RUNS, MAX_TASKS = 20, 5


async def cluster_checks(client: AsyncLatticeClient, answer: Answer) -> AsyncIterator[Finding]:
    """Yield the findings about the nodes and the queue."""
    try:
        nodes = await client.nodes()
        for finding in (*node_checks(nodes, answer), *isolation_checks(nodes)):
            yield finding
        yield await _queue_check(client, answer.info, nodes)
    except PermissionDeniedError as error:
        advice = "use a token with the scope read"
        yield Finding("cluster", "nodes", SKIPPED, f"this token may not list them: {error}", advice)
    except LatticeError as error:
        yield Finding("cluster", "nodes", ERROR, f"they cannot be listed: {error}", "see the server's log")


def node_checks(nodes: Sequence[cluster_pb2.Node], answer: Answer) -> list[Finding]:
    """Return the findings about the nodes: one for all healthy nodes, and one for each other node."""
    if not nodes:
        advice = "start one with `lattice start --worker --addr ...`; a server without --num-cpus 0 has one of its own"
        return [Finding("cluster", "nodes", ERROR, "there is no node: no task can run", advice)]
    ready = [node for node in nodes if node.state == cluster_pb2.NODE_STATE_READY]
    cpus = sum(node.capacity.cpu for node in nodes), sum(node.free.cpu for node in nodes)
    gpus = sum(len(node.capacity.gpus) for node in nodes)
    text = f"{len(ready)} of {len(nodes)} are ready; {cpus[1]:g} of {cpus[0]:g} CPUs are free, {gpus} GPUs in all"
    advice = "" if ready else "see the log of a worker, `lattice start --worker --log-level info`"
    found = [Finding("cluster", "nodes", OK if ready else ERROR, text, advice)]
    now_s = answer.info.current_time.ToNanoseconds() / 1e9
    for node in nodes:
        silent_s = now_s - node.heartbeat_time.ToNanoseconds() / 1e9 if node.HasField("heartbeat_time") else 0.0
        if node.state == cluster_pb2.NODE_STATE_DETACHED:
            text = f"its worker is disconnected; {node.attempts} attempts wait for its return"
            advice = "check that its machine runs and reaches the server; its attempts run elsewhere when time is up"
        elif node.state == cluster_pb2.NODE_STATE_DRAINING:
            text, advice = f"it is draining: {node.attempts} attempts still run", "it leaves when they have ended"
        elif answer.info.HasField("current_time") and silent_s > SILENT_S:
            text, advice = f"it sent nothing for {span(silent_s)}", "check the load of its machine, and the network"
        else:
            continue
        found.append(Finding("cluster", f"node {node.node_id}", WARNING, text, advice))
    return found


def isolation_checks(nodes: Sequence[cluster_pb2.Node]) -> list[Finding]:
    """Return how many nodes offer each level of isolation, and why others do not offer it."""
    if not nodes:
        return []
    counts = Counter(level for node in nodes for level in node.isolations)
    text = ", ".join(f"{_level(level)} by {count} of {len(nodes)} nodes" for level, count in sorted(counts.items()))
    found = [Finding("cluster", "isolation", OK, f"offered: {text or 'none'}")]
    refusals: dict[tuple[int, str], list[str]] = defaultdict(list)
    for node in nodes:
        for refusal in node.isolation_refusals:
            refusals[refusal.isolation, refusal.reason].append(node.node_id)
    for (level, reason), names in refusals.items():
        text = f"not offered by {brief(names)}: {reason}"
        advice = f"only tasks that ask for {_level(level)} need it; docs/isolation.md says how to set it up"
        # A cluster may do without a level: the nodes were tried, and tasks that ask for it are refused in words.
        found.append(Finding("cluster", f"isolation {_level(level)}", SKIPPED, text, advice))
    return found


def _level(number: int) -> str:
    if number not in resources_pb2.Isolation.values():
        return f"level {number}"
    return resources_pb2.Isolation.Name(resources_pb2.Isolation.ValueType(number)).removeprefix("ISOLATION_").lower()


async def _queue_check(
    client: AsyncLatticeClient, info: cluster_pb2.GetServerInfoResponse, nodes: Sequence[cluster_pb2.Node]
) -> Finding:
    text = f"{info.queued_tasks} tasks are queued, {info.running_attempts} attempts run"
    if not info.queued_tasks:
        return Finding("cluster", "queue", OK, text)
    longest = await _longest_waiting(client)
    if longest is None:
        return Finding("cluster", "queue", OK, text)
    waited_s = longest.waited.ToNanoseconds() / 1e9
    task = longest.task
    text += f"; {task.task_id} of run {task.run_id} has waited for {span(waited_s)}"
    reasons = "; ".join(reason.message for reason in longest.reasons)
    advice = f"it waits for: {reasons}. `lattice runs explain {task.run_id} {task.task_id}` says more"
    return Finding("cluster", "queue", queue_status(info, nodes, longest), text, advice)


def queue_status(
    info: cluster_pb2.GetServerInfoResponse,
    nodes: Sequence[cluster_pb2.Node],
    longest: task_pb2.ExplainTaskResponse,
) -> str:
    """Return `error` for a queue that cannot move, `warning` for one with a long wait, else `ok`."""
    is_late = longest.waited.ToNanoseconds() / 1e9 > LONG_WAIT_S
    has_ready = any(node.state == cluster_pb2.NODE_STATE_READY for node in nodes)
    kinds = {reason.kind for reason in longest.reasons}
    is_stuck = not info.running_attempts and not kinds & {task_pb2.WAIT_KIND_BATCH, task_pb2.WAIT_KIND_RETRY}
    if not has_ready or (is_late and is_stuck):
        return ERROR
    return WARNING if is_late else OK


async def _longest_waiting(client: AsyncLatticeClient) -> task_pb2.ExplainTaskResponse | None:
    """Return the explanation of the task that waited longest, of the first queued tasks of some of the runs."""
    found: list[task_pb2.ExplainTaskResponse] = []
    for run in await client.list_runs(MAX_RUNS, states=("running",)):
        if not run.task_counts.queued:
            continue
        try:
            for task in await client.api.calls.queued_tasks(run.run_id, MAX_TASKS):
                explained = await client.explain(run.run_id, task.task_id)
                if explained.task.state == run_pb2.TASK_STATE_QUEUED:
                    found.append(explained)
        except NotFoundError:  # It ended, and was evicted, meanwhile.
            continue
    return max(found, key=lambda explained: explained.waited.ToNanoseconds(), default=None)
