"""Owns the secrets of tasks: secrets of runs, and secrets that the server has for tenants.

Rule: a definition names a secret; only an assignment to a worker has the secret's value.
"""

from collections.abc import Mapping

from lattice_server.core.environment import NO_ENVIRONMENT, Environment
from lattice_server.core.model import Failure, FailureKind, TaskSpec

# Secrets by tenant and name.
Secrets = Mapping[str, Mapping[str, str]]
NO_SECRETS: Mapping[str, str] = {}


class SecretStore:
    """The secrets that the server has; those of a run come before them."""

    def __init__(self) -> None:
        self._secrets: Secrets = {}

    def replace(self, secrets: Secrets) -> None:
        """Replace the secrets of all tenants."""
        self._secrets = secrets

    def has(self, name: str, tenant: str) -> bool:
        """Whether the server has a secret of a tenant."""
        return name in self._secrets.get(tenant, NO_SECRETS)

    def environment(self, spec: TaskSpec, given: Mapping[str, str], tenant: str) -> Environment | Failure:
        """Return the environment of the attempts of a task; a failure when a secret has no value any more."""
        if not spec.variables and not spec.secrets:
            return NO_ENVIRONMENT
        own, found = self._secrets.get(tenant, NO_SECRETS), dict(spec.variables)
        for variable, name in spec.secrets:
            value = given.get(name, own.get(name))
            if value is None:
                text = f"the server has no value of the secret {name!r}: those of a run are kept in its memory only"
                text += "; retry the run with a client that has it"
                return Failure(FailureKind.SECRET_MISSING, text, task_id=spec.task_id)
            found[variable] = value
        return Environment(tuple(sorted(found.items())), tuple(variable for variable, _ in spec.secrets))
