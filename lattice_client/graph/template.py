"""Owns texts that are filled in where a task runs. Rule: a wrong field is found when the template is written."""

import functools
import operator
from collections.abc import Iterator
from string import Formatter
from typing import Any

from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.outputs import Deferred


class Template(Deferred):
    """A text with fields, which a task that has it among its inputs receives as a string."""

    __slots__ = ("fields", "text")

    def __init__(self, text: str, fields: dict[str, Any]) -> None:
        self.text = text
        self.fields = fields

    def __repr__(self) -> str:
        fields = "".join(f", {name}={value!r}" for name, value in self.fields.items())
        return f"template({self.text!r}{fields})"

    def __reduce__(self) -> Any:
        # Standard library only: whatever loads it gets the finished string and needs no code of this package.
        return operator.call, (functools.partial(str.format, self.text, **self.fields),)


def template(text: str, /, **fields: Any) -> Template:
    """Return a text to be filled in with outputs of tasks, as `str.format` does.

    Put it into a task's inputs in place of a string: `{"prompt": template("About {x}", x=task.output)}`. The fields may
    be any values, outputs and templates among them; each is named in the text by its name alone: `{x}`, `{x!r}`,
    `{x:.2f}`.

    Raises:
        TaskDefinitionError: the text is no format string, or its fields are not those given.
    """
    if not isinstance(text, str):
        raise TaskDefinitionError(f"a template is a text, not {type(text).__name__}")
    try:
        named = list(_fields(text))
    except ValueError as error:
        raise TaskDefinitionError(f"template {text!r} cannot be read: {error}") from error
    wrong = next((name for name in named if not name.isidentifier()), None)
    if wrong is not None:
        text = f"template {text!r}: the field {{{wrong}}} must be a name, such as {{x}}, that is given as x=..."
        raise TaskDefinitionError(f"{text}; index, and take attributes, inside a task")
    missing, unused = sorted(set(named) - fields.keys()), sorted(fields.keys() - set(named))
    if missing:
        raise TaskDefinitionError(f"template {text!r}: nothing is given for {', '.join(missing)}")
    if unused:
        raise TaskDefinitionError(f"template {text!r} has no field {', '.join(unused)}")
    return Template(text, fields)


def _fields(text: str) -> Iterator[str]:
    """Yield what a format string names, within the formats of its fields as well."""
    for _, name, spec, _ in Formatter().parse(text):
        if name is not None:
            yield name
        if spec:
            yield from _fields(spec)
