"""Converts the environment of tasks and of services. Rule: a name or a value that no process could have is refused."""

import re
from collections.abc import Mapping

from lattice.v1 import task_pb2

from lattice_server.core.environment import Variables
from lattice_server.core.errors import invalid_field

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MAX_ENVIRONMENT_BYTES = 128 * 1024
MAX_VARIABLES = 256
MAX_SECRET_NAME = 256


def check_variable(name: str, value: str | None, field: str) -> None:
    """Raise InvalidError unless this may be a variable."""
    if not VARIABLE.fullmatch(name) or name.startswith("LATTICE_"):
        raise invalid_field(field, f"{name!r} is no name of a variable, or one of Lattice's own")
    if value is None or "\0" in value:
        raise invalid_field(f'{field}["{name}"]', "needs a value without zero bytes")


def check_size(values: Mapping[str, str], field: str) -> None:
    """Raise InvalidError when values by name are too many bytes."""
    if sum(len(name) + len(value.encode()) for name, value in values.items()) > MAX_ENVIRONMENT_BYTES:
        raise invalid_field(field, f"has over {MAX_ENVIRONMENT_BYTES} bytes")


def environment_from_proto(messages: Mapping[str, task_pb2.TaskVariable], field: str) -> tuple[Variables, Variables]:
    """Return the variables of a task by value, and those by the name of a secret. Raises InvalidError."""
    if not messages:
        return (), ()
    plain: dict[str, str] = {}
    secrets: dict[str, str] = {}
    for name, message in messages.items():
        which = message.WhichOneof("source")
        value = None if which is None else message.plain or message.secret
        check_variable(name, value, field)
        if which == "secret":
            if not 0 < len(message.secret) <= MAX_SECRET_NAME or not message.secret.isprintable():
                text = f"must name a secret by 1 to {MAX_SECRET_NAME} printable characters"
                raise invalid_field(f'{field}["{name}"].secret', text)
            secrets[name] = message.secret
        else:
            plain[name] = message.plain
    if len(messages) > MAX_VARIABLES:
        raise invalid_field(field, f"has over {MAX_VARIABLES} variables")
    check_size(plain, field)
    return tuple(sorted(plain.items())), tuple(sorted(secrets.items()))


def secrets_from_proto(messages: Mapping[str, str]) -> dict[str, str]:
    """Return the secrets of a request. Raises InvalidError, which names none of their values."""
    found = dict(messages)
    for name, value in found.items():
        if not 0 < len(name) <= MAX_SECRET_NAME or not name.isprintable() or not value or "\0" in value:
            raise invalid_field("secrets", "a secret has a printable name, and a value without zero bytes")
    check_size(found, "secrets")
    return found


def fill_environment(found: Mapping[str, task_pb2.TaskVariable], plain: Variables, secrets: Variables) -> None:
    """Write the environment of a task into a message."""
    for name, value in plain:
        found[name].plain = value
    for name, secret in secrets:
        found[name].secret = secret
