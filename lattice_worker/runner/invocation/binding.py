"""The inputs of an attempt, made from the bindings in its frame: payloads, lists, dicts and selections."""

from typing import Any

from lattice_worker.runner.encoding.artifacts import open_artifact
from lattice_worker.runner.encoding.text import message_of, type_name
from lattice_worker.runner.encoding.values import WITH_OUTPUTS, PartError, PayloadError, decode_value, part_of


def bind_all(inputs: dict[str, Any], blobs: list[bytes]) -> dict[str, Any]:
    """Return the inputs of one attempt by name. Raises PayloadError."""
    bound = {}
    for name, binding in inputs.items():
        try:
            bound[name] = _bind(binding, blobs)
        except PartError as error:
            raise PayloadError(f"input {name!r}: {error}") from None
        except (PayloadError, MemoryError):
            raise
        except BaseException as error:  # SystemExit too: unpickling runs code of the value's own.
            text = f"input {name!r} cannot be rebuilt here: {type_name(type(error))}: {message_of(error)}"
            raise PayloadError(text) from error
    return bound


def _bind(binding: dict[str, Any], blobs: list[bytes]) -> Any:
    if "items" in binding:
        items = binding["items"]
        if items and items[0].get("type") == WITH_OUTPUTS:
            return _decode(items[0], blobs, [_bind(item, blobs) for item in items[1:]])
        return [_bind(item, blobs) for item in items]
    if "select" in binding:
        return part_of(_bind(binding["of"], blobs), binding["select"])
    if "entries" in binding:
        return {key: _bind(item, blobs) for key, item in binding["entries"].items()}
    return _decode(binding, blobs)


def _decode(payload: dict[str, Any], blobs: list[bytes], outputs: list[Any] | None = None) -> Any:
    data = open_artifact(payload["path"]) if "path" in payload else blobs[payload["blob"]]
    return decode_value(payload["type"], data, outputs)
