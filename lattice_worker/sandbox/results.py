"""What the agent accepts of the answers of a sandboxed process.

Rule: the process names no files. Its values come as bytes, and the agent itself writes the large ones to the store.
"""

from typing import Any

from lattice_worker.runner.artifacts import Encoder
from lattice_worker.runner.frames import ProtocolError

LARGEST_INLINE_BYTES = 1 << 40  # For the process: every value travels in its answer.


def screened(
    answer: dict[str, Any], blobs: list[bytes], store: str, folder: str, inline_limit_bytes: int
) -> tuple[dict[str, Any], list[bytes]]:
    """Return an answer whose large values lie in files of `folder`, and which has no pickled exceptions.

    Raises ProtocolError when the answer names a file, and StoreFullError or OSError when a value cannot be stored.
    """
    encoder = Encoder({"folder": folder, "store": store, "inline_limit": inline_limit_bytes})
    members = answer.get("items")
    screened = {**answer, **_member(answer, blobs, encoder)}
    if members is not None:
        screened["items"] = [_member(member, blobs, encoder) for member in members]
    return screened | {"made": encoder.made}, encoder.blobs


def _member(member: dict[str, Any], blobs: list[bytes], encoder: Encoder) -> dict[str, Any]:
    if "failure" in member:
        # An exception travels as text: to unpickle one runs code of the sandboxed process.
        return {"failure": {name: value for name, value in member["failure"].items() if name != "exception"}}
    if "outputs" not in member:
        return {}
    return {
        "outputs": {name: _stored(found, blobs, encoder) for name, found in member["outputs"].items()},
        "split": {
            name: [_stored(item, blobs, encoder) for item in items] for name, items in member.get("split", {}).items()
        },
    }


def _stored(reference: dict[str, Any], blobs: list[bytes], encoder: Encoder) -> dict[str, Any]:
    require_no_files(reference)
    return encoder.store(str(reference["type"]), [blobs[reference["blob"]]])


def require_no_files(tree: Any) -> None:
    """Raise ProtocolError when a value of a sandboxed process names a file of the store: it may be another run's."""
    pending = [tree]
    while pending:
        found = pending.pop()
        if isinstance(found, dict):
            if "artifact" in found or "path" in found:
                raise ProtocolError("a sandboxed process named a file of the store")
            pending += found.values()
        elif isinstance(found, list):
            pending += found
