"""Owns texts with fields that are filled in before a task runs. Rule: a wrong field raises at once."""

import functools
import operator
from collections.abc import Iterator
from string import Formatter
from typing import Any

from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.deferred import Deferred


class Template(Deferred):
    """A text with fields; a task whose input it is receives the finished string."""

    __slots__ = ("fields", "text")

    def __init__(self, text: str, fields: dict[str, Any]) -> None:
        self.text = text
        self.fields = fields

    def __repr__(self) -> str:
        fields = "".join(f", {name}={value!r}" for name, value in self.fields.items())
        return f"template({self.text!r}{fields})"

    def __reduce__(self) -> Any:
        # It calls the standard library only: a worker loads the finished string without this package.
        return operator.call, (functools.partial(str.format, self.text, **self.fields),)


def template(text: str, /, **fields: Any) -> Template:
    """Return a text whose fields are filled in with outputs of tasks, as `str.format` does.

    Use it as an input in place of a string: `{"prompt": template("About {x}", x=task.output)}`. A field can be any
    value, also an output or a template. The text names a field without index or attribute: `{x}`, `{x!r}`, `{x:.2f}`.

    Raises:
        TaskDefinitionError: the text is not a valid format string, or its fields differ from the arguments.
    """
    if not isinstance(text, str):
        raise TaskDefinitionError(f"a template must be a text, not {type(text).__name__}")
    try:
        named = list(_fields(text))
    except ValueError as error:
        raise TaskDefinitionError(f"template {text!r} is not a valid format string: {error}") from error
    wrong = next((name for name in named if not name.isidentifier()), None)
    if wrong is not None:
        text = f"template {text!r}: the field {{{wrong}}} must be a name, such as {{x}}, with its value given as x=..."
        raise TaskDefinitionError(f"{text}; use an index or an attribute inside a task")
    missing, unused = sorted(set(named) - fields.keys()), sorted(fields.keys() - set(named))
    if missing:
        raise TaskDefinitionError(f"template {text!r}: no value is given for {', '.join(missing)}")
    if unused:
        raise TaskDefinitionError(f"template {text!r} has no field {', '.join(unused)}")
    return Template(text, fields)


def _fields(text: str) -> Iterator[str]:
    """Yield the field names of a format string, also those within a format specification."""
    for _, name, spec, _ in Formatter().parse(text):
        if name is not None:
            yield name
        if spec:
            yield from _fields(spec)
