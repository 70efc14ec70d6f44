"""Owns the encoding of exceptions between the process of a graph and its nodes.

Rule: an exception keeps its class, arguments, attributes, notes and causes; its `__init__` is not called again, since
an exception often keeps other arguments than `__init__` had.
"""

import traceback
from collections.abc import Callable
from typing import Any

# Their C constructors hold state that `args` alone does not restore.
BUILT_BY_CALL = (UnicodeError, SyntaxError, ImportError, OSError, StopIteration, SystemExit, BaseExceptionGroup)
HERE = __file__.rpartition("/")[0]
MAX_TRACEBACK_CHARACTERS = 40_000


class RemoteTraceback(Exception):  # it is shown as the cause of an error, and is none itself
    """The traceback of a node in the process that ran it; the last cause of the node's exception."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def add_traceback(error: BaseException) -> None:
    """Add the present traceback of an exception as its last cause."""
    text = "".join(traceback.format_exception(error))[-MAX_TRACEBACK_CHARACTERS:]
    last, seen = error, {id(error)}
    while True:
        following = last.__cause__ or (None if last.__suppress_context__ else last.__context__)
        if following is None or id(following) in seen:
            break
        seen.add(id(following))
        last = following
    if not isinstance(last, RemoteTraceback):
        last.__cause__ = RemoteTraceback(text)


def reduction(error: BaseException, is_picklable: Callable[[Any], bool]) -> tuple[Any, ...]:
    """Return the reduction of an exception for a pickler. Attributes that cannot be pickled are named in a note."""
    kind = type(error)
    state: dict[str, Any] = {}
    has_own = kind.__reduce__ is not BaseException.__reduce__ or kind.__reduce_ex__ is not object.__reduce_ex__
    if has_own or isinstance(error, BUILT_BY_CALL):
        reduced: Any = error.__reduce_ex__(5)
        make, args, *rest = reduced
        state = dict(rest[0]) if rest and isinstance(rest[0], dict) else {}
    else:
        make, args = _made, (kind, error.args)
    if not is_picklable(args):
        make, args = _made, (kind, tuple(arg if is_picklable(arg) else repr(arg) for arg in error.args))
    lost = []
    for name, value in {**state, **getattr(error, "__dict__", {})}.items():
        if is_picklable(value):
            state[name] = value
        else:
            state.pop(name, None)
            lost.append(name)
    if lost:
        note = f"not sent from the other process, because it cannot be pickled: {', '.join(sorted(lost))}"
        state["__notes__"] = [*state.get("__notes__", ()), note]
    chain = (error.__cause__, error.__context__, error.__suppress_context__)
    return make, args, (state, chain), None, None, _restore


def _made(kind: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    try:
        made = kind.__new__(kind, *args)
    except Exception:  # a class with a `__new__` of its own
        made = kind.__new__(kind)
    made.args = args
    return made


def _restore(error: BaseException, state: tuple[dict[str, Any], tuple[Any, Any, bool]]) -> None:
    attributes, (cause, context, is_suppressed) = state
    for name, value in attributes.items():
        try:
            error.__dict__[name] = value
        except AttributeError:  # a class without a `__dict__`
            setattr(error, name, value)
    error.__cause__, error.__context__ = cause, context
    error.__suppress_context__ = is_suppressed
