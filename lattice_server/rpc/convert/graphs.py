"""Owns how the graph of a run looks on the wire: what was asked for, read back from what the server runs."""

from lattice.v1 import task_pb2, workflow_pb2

from lattice_server.core.model import BatchPolicy, Condition, RetryPolicy, TaskSpec
from lattice_server.core.run.run import Run
from lattice_server.rpc.convert import payloads
from lattice_server.rpc.convert.tasks import BATCH_SCOPE_FROM_PROTO, code_to_proto

BATCH_SCOPE_TO_PROTO = {
    core: proto for proto, core in BATCH_SCOPE_FROM_PROTO.items() if proto != task_pb2.BATCH_SCOPE_UNSPECIFIED
}


def graph_task_to_proto(run: Run, task_id: str, *, is_brief: bool) -> workflow_pb2.GraphTask:
    """Return one task of a run with what it waits for; a brief one without its definition."""
    record = run.tasks[task_id]
    code, _ = code_to_proto(record.spec.function)
    return workflow_pb2.GraphTask(
        task_id=task_id,
        display_name=record.spec.display_name,
        predecessor_task_ids=run.dag.predecessors[task_id],
        parent_task_id=record.item_of or record.spawned_by,
        function_name=code.display_name,
        spec=None if is_brief else task_to_spec(record.spec),
    )


def task_to_spec(spec: TaskSpec) -> task_pb2.TaskSpec:
    """Return the definition of a task with its defaults filled in, its function named by digest."""
    message = task_pb2.TaskSpec(
        task_id=spec.task_id,
        display_name=spec.display_name,
        function=spec.function.digest,
        outputs=spec.outputs,
        after=spec.after,
        resources=payloads.resources_to_proto(spec.resources),
        retry=_retry_to_proto(spec.retry),
        isolation=payloads.ISOLATION_TO_PROTO[spec.isolation],
        node_selector=dict(spec.node_selector),
        priority=spec.priority,
        max_parallel=spec.max_parallel or None,
        concurrency_key=spec.concurrency_key,
        over=spec.over,
        batch=None if spec.batch is None else _batch_to_proto(spec.batch),
        condition=None if spec.condition is None else _condition_to_proto(spec.condition),
    )
    for name, binding in spec.inputs.items():
        payloads.fill_binding(message.inputs[name], binding)
    if spec.attempt_timeout_s is not None:
        message.timeout.attempt.CopyFrom(payloads.duration(spec.attempt_timeout_s))
    if spec.total_timeout_s is not None:
        message.timeout.total.CopyFrom(payloads.duration(spec.total_timeout_s))
    return message


def _retry_to_proto(policy: RetryPolicy) -> task_pb2.RetryPolicy:
    return task_pb2.RetryPolicy(
        max_attempts=policy.max_attempts,
        initial_backoff=payloads.duration(policy.initial_backoff_s),
        backoff_multiplier=policy.backoff_multiplier,
        max_backoff=payloads.duration(policy.max_backoff_s),
        retry_on=sorted(payloads.FAILURE_KIND_TO_PROTO[kind] for kind in policy.retry_on),
        retry_on_types=sorted(policy.retry_on_types),
        max_worker_losses=policy.max_worker_losses,
    )


def _batch_to_proto(policy: BatchPolicy) -> task_pb2.BatchPolicy:
    return task_pb2.BatchPolicy(
        max_size=policy.max_size,
        max_wait=payloads.duration(policy.max_wait_s),
        scope=BATCH_SCOPE_TO_PROTO[policy.scope],
    )


def _condition_to_proto(condition: Condition) -> task_pb2.Condition:
    equals = None if condition.equals is None else payloads.payload_to_proto(condition.equals)
    output = payloads.output_to_proto(condition.output)
    return task_pb2.Condition(output=output, equals=equals, negated=condition.is_negated)
