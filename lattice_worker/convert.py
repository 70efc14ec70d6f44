"""Owns the translation between protobuf and what runners are told. Rule: payloads pass through unopened."""

import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from lattice.v1 import payload_pb2, resources_pb2, run_pb2, task_pb2, worker_pb2

from lattice_worker.sandbox.policy import DOCKER, SECCOMP, SUBPROCESS

JSON = "application/json"
# The levels of sandboxes by their numbers in the contract; nothing for no sandbox.
ISOLATIONS = {
    resources_pb2.ISOLATION_NONE: "",
    resources_pb2.ISOLATION_SUBPROCESS: SUBPROCESS,
    resources_pb2.ISOLATION_SECCOMP: SECCOMP,
    resources_pb2.ISOLATION_DOCKER: DOCKER,
}
UNMARKED = resources_pb2.ISOLATION_UNSPECIFIED
CALL_STYLES = {task_pb2.CALL_STYLE_PARAMS: "params", task_pb2.CALL_STYLE_KEYWORDS: "keywords"}
FUNCTION = "function"
# What cloudpickle names wherever it holds code itself, and not only where that is imported from.
BY_VALUE = b"cloudpickle.cloudpickle"
RETURN_STYLES = {task_pb2.RETURN_STYLE_MAPPING: "mapping", task_pb2.RETURN_STYLE_VALUE: "value"}


def function_frame(function: task_pb2.Function, bundle_path: str) -> tuple[dict[str, Any], bytes]:
    """Return the frame that tells a runner about a function."""
    python = function.python
    code = python.WhichOneof("code") or "entrypoint"
    header = {
        "kind": "function",
        "digest": function.digest,
        "code": code,
        "bundle": bundle_path,
        "name": function.display_name or python.source.name or function.entrypoint,
        "function": python.source.name,
        "entrypoint": function.entrypoint,
        "call_style": CALL_STYLES.get(python.call_style, "auto"),
        "return_style": RETURN_STYLES.get(python.return_style, "auto"),
    }
    return header, python.source.code.encode() if code == "source" else python.pickle


Outputs = Mapping[str, payload_pb2.Payload]


def binding_tree(binding: payload_pb2.Binding, store: str, blobs: list[bytes], outputs: Outputs) -> dict[str, Any]:
    """Return a binding as a runner reads it; inline bytes are appended to `blobs`, names are looked up in `outputs`."""
    source = binding.WhichOneof("source")
    match source:
        case "list":
            return {"items": [binding_tree(item, store, blobs, outputs) for item in binding.list.items]}
        case "map":
            entries = binding.map.entries
            return {"entries": {key: binding_tree(entries[key], store, blobs, outputs) for key in sorted(entries)}}
        case "selection":
            of = binding_tree(binding.selection.value, store, blobs, outputs)
            return {"of": of, "select": _steps(binding.selection.path)}
        case "output" if binding.output.path:
            whole = payload_pb2.Binding(payload=outputs[binding.output.output])
            return {"of": binding_tree(whole, store, blobs, outputs), "select": _steps(binding.output.path)}
        case _:
            payload = outputs[binding.output.output] if source == "output" else binding.payload
            media_type = payload.media_type or JSON
            if payload.WhichOneof("content") == "artifact":
                name = os.path.basename(payload.artifact.artifact_id)
                return {"type": media_type, "path": os.path.join(store, name)}
            blobs.append(payload.json.encode() if payload.WhichOneof("content") == "json" else payload.data)
            return {"type": media_type, "blob": len(blobs) - 1}


def _steps(path: Iterable[payload_pb2.PathStep]) -> list[str | int]:
    return [step.key if step.WhichOneof("step") == "key" else step.index for step in path]


def produced_at(assignment: worker_pb2.Assignment) -> resources_pb2.Isolation.ValueType:
    """Return the mark of the values of a lease: its level, or nothing without isolation."""
    is_marked = assignment.isolation != resources_pb2.ISOLATION_NONE
    return assignment.isolation if is_marked else resources_pb2.ISOLATION_UNSPECIFIED


def payload_from_answer(
    answer: dict[str, Any], blobs: list[bytes], node_id: str, level: resources_pb2.Isolation.ValueType = UNMARKED
) -> payload_pb2.Payload:
    """Return the payload a runner answered with; `level` marks those of sandboxes, and is never the runner's word."""
    if "artifact" in answer:
        artifact = payload_pb2.Artifact(artifact_id=answer["artifact"], size_bytes=answer["size"], node_id=node_id)
        return payload_pb2.Payload(media_type=answer["type"], artifact=artifact, produced_at=level)
    data = blobs[answer["blob"]]
    if answer["type"] == JSON:
        return payload_pb2.Payload(media_type=JSON, json=data.decode(), produced_at=level)
    return payload_pb2.Payload(media_type=answer["type"], data=data, produced_at=level)


def spawned_from_frame(
    frame: dict[str, Any],
    blobs: list[bytes],
    parent: task_pb2.Function,
    node_id: str,
    level: resources_pb2.Isolation.ValueType = UNMARKED,
) -> worker_pb2.AttemptSpawned:
    """Return the task a running one wants added. Its code comes with it and uses the same bundle as its parent's, or it
    is an entry point."""
    task = task_pb2.TaskSpec.FromString(blobs[frame["spec"]])
    task.task_id, task.display_name, task.function = frame["task_id"], frame["name"], FUNCTION
    task.after.extend(frame["after"])
    for name, tree in frame["inputs"].items():
        task.inputs[name].CopyFrom(_binding_from_tree(tree, blobs, node_id, level))
    function = task_pb2.Function.FromString(blobs[frame["function"]])
    if not blobs[frame["spec"]]:  # a plain function, whose task the spawning one may wire to others
        task.outputs.append("result")
        function.python.return_style = task_pb2.RETURN_STYLE_VALUE
    if not function.entrypoint:
        function.python.pickle, function.bundle_digest = blobs[frame["code"]], parent.bundle_digest
        if BY_VALUE in function.python.pickle:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            function.runtime.language, function.runtime.version = "python", version
    return worker_pb2.AttemptSpawned(tasks=[task], functions={FUNCTION: function}, called=frame.get("called", False))


def _binding_from_tree(
    tree: dict[str, Any], blobs: list[bytes], node_id: str, level: resources_pb2.Isolation.ValueType
) -> payload_pb2.Binding:
    if "task" in tree:
        path = [
            payload_pb2.PathStep(key=step) if isinstance(step, str) else payload_pb2.PathStep(index=step)
            for step in tree.get("select", ())
        ]
        reference = payload_pb2.OutputRef(task_id=tree["task"], output=tree["output"], path=path)
        return payload_pb2.Binding(output=reference)
    if "items" in tree:
        items = [_binding_from_tree(item, blobs, node_id, level) for item in tree["items"]]
        return payload_pb2.Binding(list=payload_pb2.BindingList(items=items))
    if "entries" in tree:
        entries = {key: _binding_from_tree(item, blobs, node_id, level) for key, item in tree["entries"].items()}
        return payload_pb2.Binding(map=payload_pb2.BindingMap(entries=entries))
    return payload_pb2.Binding(payload=payload_from_answer(tree, blobs, node_id, level))


def artifacts_in(report: worker_pb2.Report) -> set[str]:
    """Return the large values a report names."""
    payloads: list[payload_pb2.Payload] = []
    if report.HasField("succeeded"):
        payloads += report.succeeded.outputs.values()
        for items in report.succeeded.split.values():
            payloads += items.items
    frontier = [binding for task in report.spawned.tasks for binding in task.inputs.values()]
    while frontier:
        binding = frontier.pop()
        frontier += [*binding.list.items, *binding.map.entries.values()]
        payloads.append(binding.payload)
    return {payload.artifact.artifact_id for payload in payloads if payload.HasField("artifact")}


def close_reason(close: worker_pb2.Close) -> str:
    """Return why a stream was closed; a server may know reasons that this worker does not."""
    known = worker_pb2.CloseReason.values()
    name = worker_pb2.CloseReason.Name(close.reason) if close.reason in known else f"reason {close.reason}"
    return name.removeprefix("CLOSE_REASON_")


def report(lease_id: str, now_ns: int) -> worker_pb2.Report:
    """Return an empty report of a lease at a time in nanoseconds since the epoch."""
    message = worker_pb2.Report(lease_id=lease_id)
    message.time.seconds, message.time.nanos = divmod(now_ns, 10**9)
    return message


def timestamp(time_ns: int) -> Timestamp:
    """Return a time in nanoseconds since the epoch as a message."""
    return Timestamp(seconds=time_ns // 10**9, nanos=time_ns % 10**9)


def returned(lease_id: str, reason: str = "") -> worker_pb2.Report:
    """Return the report that gives a lease back: unstarted, or to be run again through no fault of its own."""
    return worker_pb2.Report(lease_id=lease_id, returned=worker_pb2.LeaseReturned(reason=reason))


def log_stream(name: str) -> run_pb2.LogStream.ValueType:
    """Return the stream a runner named."""
    return run_pb2.LOG_STREAM_STDERR if name == "stderr" else run_pb2.LOG_STREAM_STDOUT


def seconds(duration: Duration) -> float:
    """Return a duration in seconds."""
    return duration.seconds + duration.nanos / 1e9


def network_access(access: Mapping[str, Any]) -> run_pb2.NetworkAccess:
    """Return the message of the accesses of a sandbox to one server."""
    verdict = run_pb2.NetworkVerdict.Value(f"NETWORK_VERDICT_{access['verdict'].upper()}")
    return run_pb2.NetworkAccess(**{**access, "verdict": verdict})
