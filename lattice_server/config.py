"""Owns every setting of the server, with its default and its bounds."""

import math
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from lattice_server import logs
from lattice_server.core.frozen import frozen
from lattice_server.core.model import Isolation
from lattice_server.core.scheduling.batching import BatchRule

MIB = 1024 * 1024
GIB = 1024 * MIB
MIN_BEAT_S = 0.05
# The contract promises this much; see `Limits.inline_payload_bytes`.
MIN_INLINE_BYTES = 4096
# See `Limits.message_bytes` and `Limits.message_tasks`.
MIN_MESSAGE_BYTES = 1024 * 1024
MIN_MESSAGE_TASKS = 1000
# How metrics and traces are exported.
METRICS = ("none", "prometheus", "otlp", "otlp-http", "console")
TRACES = ("none", "otlp", "otlp-http", "console")
TASK_OUTPUT = ("events", "log")


@frozen
class Bounds:
    """The values that a file, or the environment, may give a setting. Numbers are finite and not negative.

    `is_flag` tells that only a flag sets it.
    """

    least: float = 0
    most: float = math.inf
    is_positive: bool = False
    choices: tuple[str, ...] = ()
    is_flag: bool = False


def bounded(default: Any, **bounds: Any) -> Any:
    """Return a setting with a default and `Bounds`."""
    return field(default=default, metadata={"bounds": Bounds(**bounds)})


@frozen
class ServerTls:
    """The server's certificate and key, and the authority of callers' certificates, all in PEM.

    `files` are their paths, which are read again when they change; None for a value that came from no file.
    """

    certificate: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None = None
    files: tuple[Path | None, Path | None, Path | None] = field(default=(None, None, None), compare=False)


@frozen
class ServerConfig:
    """The settings of `lattice start --head`. Sizes in bytes, times in seconds.

    A worker without a message for `session_ttl_s` is lost, and its attempts are requeued. Ray listens on `node_ip`,
    by default on the address of the server. With a `ray_address`, `ray_workers` workers are placed in that Ray
    cluster, each with `num_cpus` and `num_gpus`. An open run without a stream for `open_run_grace_s` is cancelled;
    questions to callers, and their answers, have at most `question_limit_bytes`. A service has fewer instances once its
    load has needed fewer for `shrink_delay_s`. A `token` has all scopes, and a
    `tokens_file` has the scopes of other tokens; without either, every caller has all scopes. A `secrets_file` has
    secrets of tasks. Large values are files in a folder of `store_folder`; by default in `/dev/shm` if 256 MiB of
    it are free when the server starts, or else in `TMPDIR`.

    One tenant may have `tenant_share` of each of the server's stores; `live_run_bytes` bounds the memory of live runs,
    `draft_bytes` that of graphs sent in parts, and `chunk_bytes` that of the streamed output of tasks, of which one
    chunk may have `chunk_limit_bytes`; 0 allows none. A result that was read, or is older than
    `result_ttl_s`, counts among `retained_runs`; `retained_bytes` and `retained_artifact_bytes` bound all. For
    `repeat_ttl_s` the ids of ended runs and the answers to repeatable requests are remembered. Up to `spare_bytes` of
    large values' files are kept to be written again.

    The gateways of workers beside the server listen for those of other nodes at `gateway_port`, with 0 at a free one.

    `metrics` are served to Prometheus at `metrics_address`, or sent by OTLP, or printed. `traces` are sent by OTLP, or
    printed.

    Tasks run at `min_isolation` at least: one that names no level has this one, and one that names a weaker one is
    refused.

    The `journal` is a folder, the URL of a PostgreSQL database, or `memory` for none. With `journal_sync` `normal`, a
    cut of the power may lose the last seconds. Of each tenant it keeps `journal_runs` ended runs of `journal_bytes` in
    all, and none that ended more than `journal_age_s` ago.

    The log has records from `log_level` on (`debug`, `info`, `warning`, `error`), in the `log_format` `text` or `json`.
    With `task_output` `log`, text that tasks print is in the log too, and not only in the events of their runs.
    """

    host: str = bounded("127.0.0.1", is_flag=True)
    port: int = bounded(50051, is_flag=True)
    tls: ServerTls | None = None
    token: str | None = field(default=None, repr=False)
    tokens_file: str = ""
    secrets_file: str = ""
    executor: str = bounded("ray", is_flag=True)
    min_isolation: str = bounded("none", choices=tuple(level.value for level in Isolation))
    num_cpus: float | None = None
    num_gpus: int | None = None
    gateway_port: int = bounded(0, most=65_535)
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    node_ip: str = bounded("", is_flag=True)
    ray_address: str = bounded("", is_flag=True)
    ray_workers: int = bounded(1, is_flag=True)
    session_ttl_s: float = bounded(2.8, is_positive=True)
    inline_limit_bytes: int = bounded(256 * 1024, least=MIN_INLINE_BYTES)
    log_limit_bytes: int = 1024 * 1024
    store_folder: str = ""
    min_ping_interval_s: float = 10.0
    message_limit_bytes: int = bounded(16 * 1024 * 1024, least=MIN_MESSAGE_BYTES)
    message_limit_tasks: int = bounded(50_000, least=MIN_MESSAGE_TASKS)
    worker_message_limit_bytes: int = 256 * 1024 * 1024
    retained_runs: int = 1000
    retained_bytes: int = 2 * GIB
    retained_artifact_bytes: int = 2 * GIB
    result_ttl_s: float = 3600.0
    repeat_ttl_s: float = 3600.0
    code_bytes: int = 512 * MIB
    upload_bytes: int = 8 * GIB
    upload_ttl_s: float = 600.0
    workflow_bytes: int = GIB
    draft_bytes: int = 4 * GIB
    live_run_bytes: int = 8 * GIB
    chunk_bytes: int = GIB
    spare_bytes: int = 512 * MIB
    tenant_share: float = bounded(0.5, is_positive=True, most=1)
    max_workflows: int = 10_000
    max_open_tasks: int = 1_000_000
    max_run_tasks: int = 1_000_000
    max_map_items: int = 100_000
    max_spawn_depth: int = 100
    open_run_grace_s: float = 30.0
    shrink_delay_s: float = 60.0
    question_limit_bytes: int = 1024 * 1024
    chunk_limit_bytes: int = bounded(256 * 1024, least=0, most=1024 * 1024)
    limits: Mapping[str, int] = field(default_factory=dict)
    batch_rules: tuple[BatchRule, ...] = ()
    stop_grace_s: float = 2.0
    metrics: str = bounded("none", choices=METRICS)
    metrics_address: str = ""
    traces: str = bounded("none", choices=TRACES)
    journal: str = bounded("memory", is_flag=True)
    journal_sync: str = bounded("full", choices=("full", "normal"))
    journal_runs: int = 10_000
    journal_bytes: int = 10 * GIB
    journal_age_s: float = bounded(7 * 86_400.0, is_positive=True)
    log_format: str = bounded("text", choices=logs.FORMATS)
    log_level: str = bounded("warning", choices=logs.LEVELS)
    task_output: str = bounded("events", choices=TASK_OUTPUT)

    def address(self, port: int) -> str:
        """Return `host:port`."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"

    @property
    def least(self) -> Isolation:
        """The weakest isolation of a task."""
        return Isolation(self.min_isolation)

    @property
    def heartbeat_interval_s(self) -> float:
        """How often workers and the server send heartbeats."""
        return max(MIN_BEAT_S, self.session_ttl_s / 6)

    @property
    def silence_limit_s(self) -> float:
        """How long a stream may be silent before it counts as broken; the rest of the time is for reconnecting."""
        return self.session_ttl_s * 2 / 3
