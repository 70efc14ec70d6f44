"""Owns what tasks require besides resources: values of secrets, and services. Rule: a name that is unknown is refused
before the task is accepted."""

from collections.abc import Callable, Iterable, Mapping

from lattice_server.core.errors import invalid_field
from lattice_server.core.model import TaskSpec
from lattice_server.engine.secrets import SecretStore


class Requirements:
    """Checks what tasks require. `has_service` tells whether a tenant has a service of a name."""

    def __init__(self) -> None:
        self.secrets = SecretStore()
        self.has_service: Callable[[str, str], bool] = lambda name, tenant: False

    def check(self, tasks: Iterable[TaskSpec], given: Mapping[str, str], tenant: str) -> None:
        """Raise InvalidError when a task of a tenant names a secret, or a service, that there is not.

        A secret is one of the `given` ones, or one that the server has for the tenant.
        """
        for index, spec in enumerate(tasks):
            for variable, name in spec.secrets:
                if name not in given and not self.secrets.has(name, tenant):
                    field = f'tasks[{index}].environment["{variable}"].secret'
                    raise invalid_field(field, f"there is no secret {name!r}")
            for name in spec.services:
                if not self.has_service(name, tenant):
                    raise invalid_field(f"tasks[{index}].services", f"there is no service {name!r}")
