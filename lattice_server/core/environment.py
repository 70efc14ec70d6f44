"""Owns the environment of attempts. Rule: no text that is made of it shows a value."""

from dataclasses import field

from lattice_server.core.frozen import frozen

Variables = tuple[tuple[str, str], ...]


@frozen
class Environment:
    """The variables of an attempt by name and value; `secrets` names the variables that are secret."""

    variables: Variables = field(default=(), repr=False)
    secrets: tuple[str, ...] = ()


NO_ENVIRONMENT = Environment()
