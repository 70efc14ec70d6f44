"""Converts nodes, limits and stores. Rule: each limit is read from where it is enforced."""

from collections.abc import Iterable

from lattice.v1 import cluster_pb2, resources_pb2

from lattice_server.config import ServerConfig
from lattice_server.core.messages import NodeStatus, NodeView
from lattice_server.core.run.open_run import MAX_QUESTIONS
from lattice_server.engine.stores.usage import Usage
from lattice_server.rpc.chunking import PART_BYTES, UPLOAD_CHUNK_BYTES
from lattice_server.rpc.convert.resources import (
    ISOLATION_TO_PROTO,
    MEMORY_ENFORCEMENT,
    capacity_to_proto,
    runtime_to_proto,
)
from lattice_server.rpc.convert.tasks import MAX_ID_LENGTH
from lattice_server.rpc.convert.times import MAX_WAIT_S, duration, timestamp
from lattice_server.rpc.paging import DEFAULT_PAGE, MAX_PAGE

PROTOCOL_VERSION = 1
FEATURES = ("drafts", "output-path", "request-id", "run-graph", "open-run")
NODE_STATE_TO_PROTO = {state: cluster_pb2.NodeState.Value(f"NODE_STATE_{state.name}") for state in NodeStatus}


def node_to_proto(node: NodeView, heartbeat_s: float | None) -> cluster_pb2.Node:
    """Return a node; `heartbeat_s` is the wall time of its worker's last message."""
    return cluster_pb2.Node(
        node_id=node.node_id,
        hostname=node.hostname,
        node_ip=node.node_ip,
        state=NODE_STATE_TO_PROTO[node.state],
        capacity=capacity_to_proto(node.capacity),
        free=capacity_to_proto(node.free),
        labels=node.labels,
        worker_id=node.worker_id,
        worker_pid=node.pid,
        attempts=node.attempts,
        heartbeat_time=timestamp(heartbeat_s),
        isolations=[ISOLATION_TO_PROTO[level] for level in node.isolations],
        isolation_refusals=[
            resources_pb2.IsolationRefusal(isolation=ISOLATION_TO_PROTO[level], reason=reason)
            for level, reason in node.isolation_refusals.items()
        ],
        runtime=runtime_to_proto(node.runtime),
        entrypoints=sorted(node.entrypoints),
        network_isolations=sorted(ISOLATION_TO_PROTO[level] for level in node.network_isolations),
        memory_enforcement=MEMORY_ENFORCEMENT[node.limits_memory_by_cgroup],
    )


def limits_to_proto(config: ServerConfig, stores: Iterable[Usage]) -> cluster_pb2.Limits:
    """Return the limits of a server with this configuration and these stores."""
    of = {usage.what: usage.bound.of_tenant for usage in stores}
    return cluster_pb2.Limits(
        inline_payload_bytes=config.inline_limit_bytes,
        message_bytes=config.message_limit_bytes,
        upload_chunk_bytes=UPLOAD_CHUNK_BYTES,
        page_bytes=PART_BYTES,
        default_page_size=DEFAULT_PAGE,
        max_page_size=MAX_PAGE,
        max_wait=duration(MAX_WAIT_S),
        run_tasks=config.max_run_tasks,
        open_tasks=config.max_open_tasks,
        map_items=config.max_map_items,
        spawn_depth=config.max_spawn_depth,
        stored_workflows=config.max_workflows,
        log_bytes=config.log_limit_bytes,
        id_characters=MAX_ID_LENGTH,
        open_run_grace=duration(config.open_run_grace_s),
        question_bytes=config.question_limit_bytes,
        open_questions=MAX_QUESTIONS,
        message_tasks=config.message_limit_tasks,
        tenant_code_bytes=of["code"],
        tenant_upload_bytes=of["uploads"],
        tenant_workflow_bytes=of["stored workflows"],
        upload_time=duration(config.upload_ttl_s),
        result_time=duration(config.result_ttl_s),
        repeat_time=duration(config.repeat_ttl_s),
    )


def usage_to_proto(usage: Usage) -> cluster_pb2.StoreUsage:
    """Return the use of a store."""
    bound = usage.bound
    return cluster_pb2.StoreUsage(
        name=usage.what, used_bytes=usage.total, limit_bytes=bound.total, tenant_limit_bytes=bound.of_tenant
    )
