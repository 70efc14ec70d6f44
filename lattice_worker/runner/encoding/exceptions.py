"""The pickles of exceptions. Rule: loading one does not call the `__init__` of a class that Python code defines.

Such an `__init__` often takes other arguments than the kept `args`, and then a plain pickle cannot be loaded.
The standard library can load the result.
"""

import copyreg
import io
from typing import Any

from lattice_worker.runner.encoding.pickler import Pickler, dumps

# Their constructors hold state that `args` and attributes do not restore.
BUILT_BY_CALL = (UnicodeError, SyntaxError, ImportError, OSError, StopIteration, SystemExit, BaseExceptionGroup)


class _Pickler(Pickler):
    def reducer_override(self, obj: Any) -> Any:
        """Return the reduction of an exception by its arguments and attributes."""
        if isinstance(obj, BaseException) and _is_plain(type(obj)):
            return copyreg.__newobj__, (type(obj), *obj.args), _sendable(vars(obj)) or None  # type: ignore[attr-defined]
        return super().reducer_override(obj)


def pickled(error: BaseException) -> bytes:
    """Return the pickle of an exception, without attributes that cannot be pickled; a note names these."""
    file = io.BytesIO()
    _Pickler(file).dump(error)
    return file.getvalue()


def _is_plain(kind: type[BaseException]) -> bool:
    """Whether the state of exceptions of a class is their arguments and attributes."""
    has_reduction = kind.__reduce__ is not BaseException.__reduce__ or kind.__reduce_ex__ is not object.__reduce_ex__
    has_slots = any(vars(base).get("__slots__") for base in kind.__mro__)
    has_new = any(isinstance(vars(base).get("__new__"), staticmethod) for base in kind.__mro__)
    return not (has_reduction or has_slots or has_new or issubclass(kind, BUILT_BY_CALL))


def _sendable(attributes: dict[str, Any]) -> dict[str, Any]:
    found, lost = {}, []
    for name, value in attributes.items():
        try:
            dumps(value)
            found[name] = value
        except Exception:
            lost.append(name)
    if lost:
        note = f"not sent by the worker, because it cannot be pickled: {', '.join(sorted(lost))}"
        found["__notes__"] = [*found.get("__notes__", ()), note]
    return found
