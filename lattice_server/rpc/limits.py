"""Owns how the server's limits and features look on the wire. Rule: each limit is read from where it is enforced."""

from collections.abc import Iterable

from lattice.v1 import cluster_pb2

from lattice_server.config import ServerConfig
from lattice_server.core.run.open_run import MAX_QUESTIONS
from lattice_server.engine.usage import Usage
from lattice_server.rpc.artifacts import UPLOAD_CHUNK_BYTES
from lattice_server.rpc.chunking import PART_BYTES
from lattice_server.rpc.convert import payloads
from lattice_server.rpc.convert.tasks import MAX_ID_LENGTH
from lattice_server.rpc.paging import DEFAULT_PAGE, MAX_PAGE
from lattice_server.rpc.waiting import MAX_WAIT_S

PROTOCOL_VERSION = 1
FEATURES = ("drafts", "output-path", "request-id", "run-graph", "open-run")


def limits_to_proto(config: ServerConfig, stores: Iterable[Usage]) -> cluster_pb2.Limits:
    """Return the limits that callers of a server with this configuration and these stores meet."""
    of = {usage.what: usage.bound.of_tenant for usage in stores}
    return cluster_pb2.Limits(
        inline_payload_bytes=config.inline_limit_bytes,
        message_bytes=config.message_limit_bytes,
        upload_chunk_bytes=UPLOAD_CHUNK_BYTES,
        page_bytes=PART_BYTES,
        default_page_size=DEFAULT_PAGE,
        max_page_size=MAX_PAGE,
        max_wait=payloads.duration(MAX_WAIT_S),
        run_tasks=config.max_run_tasks,
        open_tasks=config.max_open_tasks,
        map_items=config.max_map_items,
        spawn_depth=config.max_spawn_depth,
        stored_workflows=config.max_workflows,
        log_bytes=config.log_limit_bytes,
        id_characters=MAX_ID_LENGTH,
        open_run_grace=payloads.duration(config.open_run_grace_s),
        question_bytes=config.question_limit_bytes,
        open_questions=MAX_QUESTIONS,
        message_tasks=config.message_limit_tasks,
        tenant_code_bytes=of["code"],
        tenant_upload_bytes=of["uploads"],
        tenant_workflow_bytes=of["stored workflows"],
        upload_time=payloads.duration(config.upload_ttl_s),
        result_time=payloads.duration(config.result_ttl_s),
        repeat_time=payloads.duration(config.repeat_ttl_s),
    )


def usage_to_proto(usage: Usage) -> cluster_pb2.StoreUsage:
    """Return how full a store is."""
    bound = usage.bound
    return cluster_pb2.StoreUsage(
        name=usage.what, used_bytes=usage.total, limit_bytes=bound.total, tenant_limit_bytes=bound.of_tenant
    )
