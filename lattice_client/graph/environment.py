"""Owns the environment of tasks, and references to secrets. Rule: a definition has the name of a secret, no value."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lattice.v1 import task_pb2

from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.names import check_text

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Secret:
    """A value of this process's environment that is sent as a secret; see `secret`."""

    name: str

    def value(self) -> str:
        """Return the value. Raises TaskDefinitionError when the environment does not have it."""
        if not (found := secret_value(self.name)):
            raise TaskDefinitionError(f"secret({self.name!r}): the environment has no variable of this name")
        return found


def secret(name: str) -> Secret:
    """Return a reference to a secret, for `env` of a task, a workflow, a client or a service.

    It is a variable of this process's environment, whose value is read when the run or the service is started. For a
    task it may also be a secret that the server has; see `lattice start --secrets`. No answer of the server shows the
    value, and it is masked in logs.

    Raises TaskDefinitionError when the name is not a text.
    """
    check_text("the name of a secret", name)
    return Secret(name)


def secret_value(name: str) -> str | None:
    """Return the value of a variable of this process, whose value no error shows. Raises TaskDefinitionError."""
    found = os.environ.get(name)
    if found is not None and not _is_unicode(found):
        raise TaskDefinitionError(f"secret({name!r}): the value of this variable is not valid UTF-8")
    return found


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


Env = Mapping[str, str | Secret]


def checked(label: str, env: object) -> dict[str, str | Secret]:
    """Return an environment. Raises TaskDefinitionError for a wrong name or value."""
    if env is None:
        return {}
    if not isinstance(env, Mapping):
        raise TaskDefinitionError(f'{label}: env must be a dict, {{"NAME": "value"}}, not {env!r}')
    for name, value in env.items():
        if not isinstance(name, str) or not VARIABLE.fullmatch(name) or name.startswith("LATTICE_"):
            text = f"{name!r} is no name of a variable, or one of Lattice's own"
            raise TaskDefinitionError(f"{label}: env: {text}")
        if not isinstance(value, str | Secret) or (isinstance(value, str) and "\0" in value):
            # The value is not shown: it may be meant as a secret.
            text = f"the value of {name!r} must be a text or secret(...), not a {type(value).__name__}"
            raise TaskDefinitionError(f"{label}: env: {text}")
        if isinstance(value, str) and not _is_unicode(value):
            raise TaskDefinitionError(f"{label}: env: the value of {name!r} is not valid Unicode")
    return dict(env)


def fill(message: Mapping[str, task_pb2.TaskVariable], env: Env) -> None:
    """Add the variables that a message does not have yet."""
    for name, value in env.items():
        if name not in message:
            if isinstance(value, Secret):
                message[name].secret = value.name
            else:
                message[name].plain = value


def values_of(messages: Iterable[Mapping[str, Any]], envs: Iterable[Env]) -> dict[str, str]:
    """Return the values of all secrets that messages and environments name and that this process has."""
    names = {variable.secret for message in messages for variable in message.values() if variable.secret}
    names |= {value.name for env in envs for value in env.values() if isinstance(value, Secret)}
    return {name: value for name in names if (value := secret_value(name))}
