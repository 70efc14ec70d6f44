"""Owns the check that the code of a node changes no object that it captures from the process of the graph.

Rule: a worker has a copy of what code captures, so that a change of it would be lost. The check reads the source of
each function that is sent by value, and of the functions and methods of the project that it calls.
"""

import ast
import asyncio
import inspect
import textwrap
from collections import Counter, deque
from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from lattice_client.code.modules import is_installed
from lattice_client.code.pickler import FunctionPickler
from lattice_client.errors import TaskDefinitionError

CONTAINERS = (list, dict, set, deque, bytearray)
# Methods that change a container.
CHANGING = frozenset(
    {
        *(
            "append",
            "appendleft",
            "extend",
            "extendleft",
            "insert",
            "reverse",
            "rotate",
            "sort",
            "clear",
            "remove",
            "pop",
        ),
        *("remove", "pop", "popleft", "popitem", "add", "discard", "update", "setdefault", "subtract"),
        *("difference_update", "intersection_update", "symmetric_difference_update"),
    }
)
UNKNOWN = object()
LoopBound: type = next(base for base in asyncio.Event.__mro__ if base.__name__ == "_LoopBoundMixin")


class _Functions(FunctionPickler):
    """Collects the functions that are sent by value."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self.functions: list[FunctionType] = []

        # Locks, events and queues of asyncio, whose copies pickle makes without an error.
        self.signals: list[Any] = []

    def reducer_override(self, obj: Any) -> Any:
        """Return the reduction of an object, and collect locks, events and queues."""
        if isinstance(obj, LoopBound):
            self.signals.append(obj)
        return super().reducer_override(obj)

    def _note(self, obj: Any) -> None:
        super()._note(obj)
        if isinstance(obj, FunctionType):
            self.functions.append(obj)


def check(function: Any, what: str) -> None:
    """Raise TaskDefinitionError, which names `what`, when the code of a function changes an object that it captures.

    Code that cannot be pickled is not checked.
    """
    pickler = _Functions(function)
    try:
        pickler.dump_function()
    except Exception:
        return
    if pickler.signals:
        kind = f"asyncio.{type(pickler.signals[0]).__name__}"
        text = f"{what} cannot run on Lattice: its code captures an {kind}, which works within one process only"
        raise TaskDefinitionError(f"{text}; name it in local=[...] to run it here")
    # Among them are functions of installed packages, such as the `__repr__` that `dataclass` makes.
    pending: list[tuple[Any, Any]] = [(found, UNKNOWN) for found in pickler.functions if _is_of_project(found)]
    if isinstance(function, MethodType):
        pending.append((function.__func__, function.__self__))
    elif isinstance(function, FunctionType) and _is_of_project(function):
        pending.append((function, UNKNOWN))
    elif not isinstance(function, FunctionType | type):
        pending.append((vars(type(function)).get("__call__"), function))
    seen = set()
    while pending:
        found, owner = pending.pop()
        if isinstance(found, FunctionType) and (id(found), id(owner)) not in seen:
            seen.add((id(found), id(owner)))
            pending += [(inner, its) for inner, its in _check(found, owner, what) if _is_of_project(inner)]


def _is_of_project(function: FunctionType) -> bool:
    """Whether a function is the user's own code, and not that of an installed package."""
    own_package = __name__.partition(".")[0]
    is_ours = str(function.__module__).partition(".")[0] == own_package
    return not is_ours and not is_installed(function.__code__.co_filename)


def _check(function: FunctionType, owner: Any, what: str) -> Iterator[tuple[FunctionType, Any]]:
    """Yield the functions, and the methods with their objects, that a function calls. Raises TaskDefinitionError."""
    changes = _Changes(function, owner)
    for name, line in changes.found():
        place = f"{function.__code__.co_filename}:{line}"
        text = f"{what} cannot run on Lattice: its code changes {name} ({place}), of which the worker has only a copy"
        raise TaskDefinitionError(f"{text}; return an update, use the store, or name it in local=[...] to run it here")
    yield from changes.called()


class _Changes:
    """The changes that a function's source makes to its captured variables. `owner` is its `self`, or UNKNOWN."""

    def __init__(self, function: FunctionType, owner: Any) -> None:
        self._code = code = function.__code__
        self._cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        self._globals = function.__globals__
        self._owner = owner
        self._own_name = code.co_varnames[0] if owner is not UNKNOWN and code.co_argcount else ""
        self._inner = {name for inner in _inner(code) for name in (*inner.co_varnames, *inner.co_cellvars)}
        self._tree, self._first = _tree(code)
        # Other names of captured objects within the function, with the expressions that they stand for.
        self._aliases: dict[str, ast.expr] = {}
        self._note_aliases()

    def _note_aliases(self) -> None:
        steps = list(ast.walk(self._tree))
        bound = Counter(step.id for step in steps if isinstance(step, ast.Name) and isinstance(step.ctx, ast.Store))
        parameters = {step.arg for step in steps if isinstance(step, ast.arg)}
        for step in sorted(steps, key=lambda step: getattr(step, "lineno", 0)):
            match step:
                case (
                    ast.Assign(targets=[ast.Name(id=name)], value=value)
                    | ast.NamedExpr(target=ast.Name(id=name), value=value)
                ):
                    is_alias = self._content(value) is not UNKNOWN
                case ast.For(target=ast.Name(id=name), iter=value):
                    content = self._content(value)
                    is_alias = isinstance(content, CONTAINERS) and any(isinstance(i, CONTAINERS) for i in content)
                case _:
                    continue
            if is_alias and bound[name] == 1 and name not in parameters:
                self._aliases[name] = self._resolved(value)

    def called(self) -> Iterator[tuple[FunctionType, Any]]:
        """Yield the functions that the function calls, and the methods of captured objects, each with its object."""
        for step in ast.walk(self._tree):
            if not isinstance(step, ast.Call):
                continue
            if isinstance(found := self._content(step.func), FunctionType):
                yield found, UNKNOWN
                continue
            owner, name = found, "__call__"
            if found is UNKNOWN and isinstance(step.func, ast.Attribute):
                owner, name = self._content(step.func.value), step.func.attr
            method = None if owner is UNKNOWN else inspect.getattr_static(type(owner), name, None)
            if isinstance(method, FunctionType):
                yield method, owner

    def found(self) -> Iterator[tuple[str, int]]:
        """Yield the names of changed variables, and the lines."""
        first = self._first
        for step in ast.walk(self._tree):
            match step:
                case ast.Nonlocal(names=names):
                    yield from ((name, first + step.lineno) for name in names if self._is_free(name))
                case ast.Attribute(value=changed, attr=method, ctx=ast.Load()) if method in CHANGING:
                    yield from self._of_container(changed, first)
                case ast.Call(func=ast.Name(id="next"), args=[taken, *_]) | ast.For(iter=taken):
                    if isinstance(self._content(taken), Iterator):
                        yield ast.unparse(self._resolved(taken)), first + taken.lineno
                case ast.Assign(targets=targets, value=value):
                    for target in targets:
                        yield from self._of_target(target, first, is_in_place=_is_computed_from(target, value))
                case ast.Delete(targets=targets):
                    for target in targets:
                        yield from self._of_target(target, first)
                case ast.AugAssign(target=target):
                    yield from self._of_target(target, first, is_in_place=True)
                case ast.AnnAssign(target=target) if step.value is not None:
                    yield from self._of_target(target, first)

    def _is_free(self, name: str) -> bool:
        return name in self._cells and name not in self._inner

    def _resolved(self, expression: ast.expr) -> ast.expr:
        """Return an expression with the captured names in the place of their aliases."""
        match expression:
            case ast.NamedExpr(value=value):
                return self._resolved(value)
            case ast.Name(id=name) if name in self._aliases:
                return self._aliases[name]
            case ast.Attribute(value=value, attr=name):
                return ast.copy_location(ast.Attribute(self._resolved(value), name, expression.ctx), expression)
            case ast.Subscript(value=value, slice=key):
                return ast.copy_location(ast.Subscript(self._resolved(value), key, expression.ctx), expression)
        return expression

    def _of_target(self, target: ast.expr, first: int, *, is_in_place: bool = False) -> Iterator[tuple[str, int]]:
        match target:
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                for part in parts:
                    yield from self._of_target(part, first)
            case ast.Starred(value=value):
                yield from self._of_target(value, first)
            case ast.Subscript(value=changed):
                yield from self._of_container(changed, first, is_in_place=is_in_place)
            case ast.Attribute(value=changed):
                # An attribute may be set at its first use, such as a model that was loaded.
                changed = self._resolved(changed)
                name, holder = _root(changed), self._content(changed)
                is_checked = self._is_free(name) or (is_in_place and name == self._own_name)
                if is_checked and holder is not UNKNOWN and not isinstance(holder, ModuleType):
                    yield ast.unparse(self._resolved(target)), first + target.lineno
            case ast.Name(id=name) if is_in_place and self._is_global(name):
                yield name, first + target.lineno

    def _of_container(self, changed: ast.expr, first: int, *, is_in_place: bool = False) -> Iterator[tuple[str, int]]:
        resolved = self._resolved(changed)
        content = self._content(resolved)
        if isinstance(content, CONTAINERS) and (
            is_in_place or self._is_free(_root(resolved)) or not _is_cache(content)
        ):
            yield ast.unparse(resolved), first + changed.lineno

    def _is_global(self, name: str) -> bool:
        is_local = name in (*self._code.co_varnames, *self._code.co_cellvars, *self._code.co_freevars, *self._inner)
        return not is_local and name in self._globals

    def _content(self, expression: ast.expr) -> Any:
        """Return the object that an expression stands for, without running any code; UNKNOWN for most expressions."""
        match expression:
            case ast.NamedExpr(value=value):
                return self._content(value)
            case ast.Name(id=name) if name in self._aliases:
                return self._content(self._aliases[name])
            case ast.Name(id=name) if self._is_free(name):
                try:
                    return self._cells[name].cell_contents
                except ValueError:  # it is assigned later
                    return UNKNOWN
            case ast.Name(id=name) if name and name == self._own_name:
                return self._owner
            case ast.Name(id=name) if self._is_global(name):
                return self._globals[name]
            case ast.Attribute(value=value, attr=name):
                return _attributes(self._content(value)).get(name, UNKNOWN)
            case ast.Subscript(value=value):
                # A container stands for its items.
                found = self._content(value)
                return found if isinstance(found, CONTAINERS) else UNKNOWN
        return UNKNOWN


def _is_cache(content: Any) -> bool:
    """Whether a container of a global or of an object may be a cache, of which each process may have its own."""
    return isinstance(content, dict) and not isinstance(content, Counter)


def _attributes(item: Any) -> dict[str, Any]:
    """Return an object's own attributes, without calling its code."""
    try:
        found: dict[str, Any] = object.__getattribute__(item, "__dict__")
    except AttributeError:
        return {}
    return found


def _inner(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _inner(constant)


def _root(expression: ast.expr) -> str:
    while isinstance(expression, ast.Attribute | ast.Subscript):
        expression = expression.value
    return expression.id if isinstance(expression, ast.Name) else ""


def _is_computed_from(target: ast.expr, value: ast.expr) -> bool:
    """Whether an assignment computes the new value from the old one, as `n = n + 1` does."""
    if not isinstance(value, ast.BinOp | ast.UnaryOp):
        return False
    text = ast.unparse(target)
    return any(ast.unparse(part) == text for part in ast.walk(value) if isinstance(part, ast.expr))


def _tree(code: CodeType) -> tuple[ast.AST, int]:
    """Return the syntax tree of a function, and the number of lines before it; an empty tree without its source."""
    try:
        lines, first = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError, TypeError):
        return ast.Module([], []), 0
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = (step for step in ast.walk(tree) if isinstance(step, kinds) and step.name == code.co_name)
    return next(found, tree), first - 1
