"""Owns the history of a run in the Trace Event Format, which Perfetto and `chrome://tracing` read. Rule: it is pure.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. Nodes are its processes.
Attempts that ran side by side are on different threads, so that no two slices of a thread overlap. The waits are
asynchronous slices of the process `queue`. An arrow leads from each task of the critical path to the next one.
"""

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from lattice_client.cli.attempts import Attempt, History

QUEUE_PID = 1
# Names of colours of the format.
COLOURS = {"succeeded": "good", "failed": "terrible", "cancelled": "grey", "running": "thread_state_running"}


def chrome_trace(history: History, run_id: str, name: str) -> dict[str, Any]:
    """Return the trace as a JSON document. Its times are microseconds since the start of the run."""

    def at_us(time_s: float) -> int:
        return round((time_s - history.begin_s) * 1e6)

    nodes = sorted({attempt.node_id for attempt in history.attempts if attempt.node_id})
    pids = {node_id: number for number, node_id in enumerate(nodes, QUEUE_PID + 1)}
    events = [_named("process_name", QUEUE_PID, 0, "queue"), *(_sorted(QUEUE_PID, 0))]
    for node_id, pid in pids.items():
        events += [_named("process_name", pid, 0, f"node {node_id}"), *_sorted(pid, pid)]
    slices: dict[tuple[str, int], dict[str, Any]] = {}
    for node_id, tracks in tracks_of(history).items():
        for track, attempts in enumerate(tracks):
            events.append(_named("thread_name", pids[node_id], track, f"slot {track + 1}"))
            for attempt in attempts:
                slices[attempt.task_id, attempt.number] = _slice(history, attempt, pids[node_id], track)
    events += slices.values()
    for number, attempt in enumerate(history.attempts):
        begin, end = at_us(attempt.ready_s), at_us(attempt.ready_s + attempt.queued_s(history.now_s))
        if end > begin:
            shown = {"name": attempt.label, "cat": "queued", "id": number, "pid": QUEUE_PID, "tid": 0}
            events += [{**shown, "ph": "b", "ts": begin}, {**shown, "ph": "e", "ts": end}]
    events += _arrows(history, slices)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"run_id": run_id, "name": name, "begin_s": history.begin_s},
    }


def tracks_of(history: History) -> dict[str, list[list[Attempt]]]:
    """Return by node its attempts in as few tracks as keep those of a track from overlapping."""
    tracks: dict[str, list[list[Attempt]]] = defaultdict(list)
    free: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for attempt in history.attempts:
        if attempt.start_s is None:
            continue
        end_s = attempt.start_s + attempt.ran_s(history.now_s)
        waiting = free[attempt.node_id]
        if waiting and waiting[0][0] <= attempt.start_s:
            _, track = heapq.heappop(waiting)
        else:
            track = len(tracks[attempt.node_id])
            tracks[attempt.node_id].append([])
        tracks[attempt.node_id][track].append(attempt)
        heapq.heappush(waiting, (end_s, track))
    return dict(sorted(tracks.items()))


def _slice(history: History, attempt: Attempt, pid: int, tid: int) -> dict[str, Any]:
    assert attempt.start_s is not None
    # Both ends are rounded, so that neighbours do not overlap by a microsecond.
    begin = round((attempt.start_s - history.begin_s) * 1e6)
    end = round((attempt.start_s - history.begin_s + attempt.ran_s(history.now_s)) * 1e6)
    arguments = {
        "task_id": attempt.task_id,
        "attempt": attempt.number,
        "outcome": attempt.outcome,
        "queued_s": attempt.queued_s(history.now_s),
        "gpus": list(attempt.gpu_indices),
        "is_critical": attempt.is_critical,
    }
    return {
        "name": attempt.label,
        "cat": attempt.function or "task",
        "ph": "X",
        "ts": begin,
        "dur": end - begin,
        "pid": pid,
        "tid": tid,
        "cname": COLOURS.get(attempt.outcome, "generic_work"),
        "args": {**arguments, **({"failure": attempt.failure} if attempt.failure else {})},
    }


def _arrows(history: History, slices: Mapping[tuple[str, int], dict[str, Any]]) -> Iterable[dict[str, Any]]:
    on_path = [attempt for attempt in history.on_path() if attempt.start_s is not None]
    for number, (before, after) in enumerate(itertools.pairwise(on_path)):
        first, second = (slices[attempt.task_id, attempt.number] for attempt in (before, after))
        shown = {"name": "critical path", "cat": "critical path", "id": number}
        yield {**shown, "ph": "s", "pid": first["pid"], "tid": first["tid"], "ts": first["ts"] + first["dur"]}
        yield {**shown, "ph": "f", "bp": "e", "pid": second["pid"], "tid": second["tid"], "ts": second["ts"]}


def _named(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def _sorted(pid: int, index: int) -> list[dict[str, Any]]:
    return [{"name": "process_sort_index", "ph": "M", "pid": pid, "tid": 0, "args": {"sort_index": index}}]
