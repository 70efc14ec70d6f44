"""The values of a sandboxed process: inputs that are sent to it, and answers that are accepted from it.

Rule: the process neither opens nor names files of the store. Values travel as bytes in both directions, and the agent
itself reads and writes the values that lie in the store. The process says how its values are encoded, and nothing else
about them: the agent says at which level they were produced.
"""

from collections.abc import Iterable
from typing import Any

from lattice_worker.runner.encoding import arrays, dataframes, tagged, values
from lattice_worker.runner.encoding.artifacts import Encoder, StoreFullError
from lattice_worker.runner.encoding.spare_files import opened
from lattice_worker.runner.frames import ProtocolError

LARGEST_INLINE_BYTES = 1 << 40  # For the process: every value travels in its answer.
MAX_INPUT_BYTES = 256 * 1024 * 1024
DATA = frozenset({values.JSON, values.BYTES, tagged.MEDIA_TYPE, arrays.NPY, dataframes.ARROW})
ENCODINGS = DATA | {values.CLOUDPICKLE, values.PICKLE5}
FAILURE_KINDS = frozenset({"user_error", "out_of_memory", "payload", "resources"})
# An exception travels as text: to unpickle one runs code of the sandboxed process.
FAILURE_FIELDS = frozenset({"kind", "type", "message", "traceback", "base_types"})


class InputError(Exception):
    """An input cannot be sent to a sandboxed process; the message is for people."""


def inlined(tree: dict[str, Any], blobs: list[bytes]) -> dict[str, Any]:
    """Return an input as it was described with the files it names read into `blobs`. Raises InputError."""
    if "path" in tree:
        try:
            with opened(tree["path"]) as file:
                data = file.read()
        except FileNotFoundError:
            raise InputError("an input's value is no longer in the store of this node") from None
        if sum(map(len, blobs)) + len(data) > MAX_INPUT_BYTES:
            raise InputError(f"the inputs of a sandboxed task may have {MAX_INPUT_BYTES} bytes")
        blobs.append(data)
        return {"type": tree["type"], "blob": len(blobs) - 1}
    if "items" in tree:
        return {"items": [inlined(item, blobs) for item in tree["items"]]}
    if "entries" in tree:
        return {"entries": {key: inlined(item, blobs) for key, item in tree["entries"].items()}}
    if "select" in tree:
        return tree | {"of": inlined(tree["of"], blobs)}
    return tree


def screened(
    answer: dict[str, Any], blobs: list[bytes], store: str, folder: str, inline_limit_bytes: int
) -> tuple[dict[str, Any], list[bytes]]:
    """Return an answer whose large values lie in files of `folder`, and which has no pickled exceptions.

    One whose values cannot be stored becomes a failure. Raises ProtocolError when the answer names a file.
    """
    # No file that has the bytes of another task comes near a sandbox, though this one may not be opened there.
    header = {"folder": folder, "store": store, "inline_limit": inline_limit_bytes, "may_reuse": False}
    encoder = Encoder(header)
    try:
        accepted = answer | _member(answer, blobs, encoder)
        if "items" in answer:
            accepted["items"] = [_member(member, blobs, encoder) for member in answer["items"]]
    except (OSError, StoreFullError) as error:
        encoder.take_back()
        accepted = {name: answer[name] for name in ("kind", "id", "duration", "has_raw")}
        accepted["failure"] = {"kind": "resources", "message": f"a large value could not be stored: {error}"}
    return accepted | {"made": encoder.made}, encoder.blobs


def _member(member: dict[str, Any], blobs: list[bytes], encoder: Encoder) -> dict[str, Any]:
    if "failure" in member:
        failure = {name: value for name, value in member["failure"].items() if name in FAILURE_FIELDS}
        if failure["kind"] not in FAILURE_KINDS:
            raise ProtocolError(f"a sandboxed process cannot fail by {failure['kind']!r}")
        return {"failure": failure}
    if "outputs" not in member:
        return {}
    return {
        "outputs": {name: _stored(found, blobs, encoder) for name, found in member["outputs"].items()},
        "split": {
            name: [_stored(item, blobs, encoder) for item in items] for name, items in member.get("split", {}).items()
        },
    }


def _stored(reference: dict[str, Any], blobs: list[bytes], encoder: Encoder) -> dict[str, Any]:
    require_values([reference])
    return encoder.store(reference["type"], [blobs[reference["blob"]]])


def require_values(trees: Iterable[dict[str, Any]]) -> None:
    """Raise ProtocolError unless each value in some bindings is bytes in an encoding of Lattice, and nothing more.

    One that names a file of the store may name another run's, and one that names its origin may name a false one.
    """
    pending = list(trees)
    while pending:
        match pending.pop():
            case {"items": [{"type": values.WITH_OUTPUTS} as pickled, *others], **more} if not more:
                pending += [pickled | {"type": values.PICKLE5}, *others]
            case {"items": list(items), **more} if not more:
                pending += items
            case {"entries": dict(entries), **more} if not more:
                pending += entries.values()
            case {"task": str(), "output": str(), **more} if not more.keys() - {"select"}:
                pass
            case {"type": str(media_type), "blob": int(), **more} if media_type in ENCODINGS and not more:
                pass
            case {"type": media_type, **more}:
                named = ", ".join(map(str, more))
                raise ProtocolError(f"a sandboxed process sent {media_type!r:.100} with {named:.100} as a value")
            case _:
                raise ProtocolError("a sandboxed process sent something else than values")
