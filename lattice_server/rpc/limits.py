"""Owns how the server's limits and features look on the wire. Rule: each limit is read from where it is enforced."""

from lattice.v1 import cluster_pb2

from lattice_server.config import ServerConfig
from lattice_server.core.open_run import MAX_QUESTIONS
from lattice_server.rpc import convert
from lattice_server.rpc.artifacts import UPLOAD_CHUNK_BYTES
from lattice_server.rpc.definitions import MAX_ID_LENGTH
from lattice_server.rpc.paging import DEFAULT_PAGE, MAX_PAGE
from lattice_server.rpc.parts import PART_BYTES
from lattice_server.rpc.waiting import MAX_WAIT_S

PROTOCOL_VERSION = 1
FEATURES = ("drafts", "output-path", "request-id", "run-graph", "open-run")


def limits_to_proto(config: ServerConfig) -> cluster_pb2.Limits:
    """Return the limits that callers of a server with this configuration meet."""
    return cluster_pb2.Limits(
        inline_payload_bytes=config.inline_limit_bytes,
        message_bytes=config.message_limit_bytes,
        upload_chunk_bytes=UPLOAD_CHUNK_BYTES,
        page_bytes=PART_BYTES,
        default_page_size=DEFAULT_PAGE,
        max_page_size=MAX_PAGE,
        max_wait=convert.duration(MAX_WAIT_S),
        run_tasks=config.max_run_tasks,
        open_tasks=config.max_open_tasks,
        map_items=config.max_map_items,
        spawn_depth=config.max_spawn_depth,
        stored_workflows=config.max_workflows,
        log_bytes=config.log_limit_bytes,
        id_characters=MAX_ID_LENGTH,
        open_run_grace=convert.duration(config.open_run_grace_s),
        question_bytes=config.question_limit_bytes,
        open_questions=MAX_QUESTIONS,
        message_tasks=config.message_limit_tasks,
    )
