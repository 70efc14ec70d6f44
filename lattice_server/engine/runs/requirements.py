"""Owns what tasks require besides resources: values of secrets, and services. Rule: a name that is unknown is refused
before the task is accepted."""

from collections.abc import Callable, Iterable, Mapping

from lattice_server.core.errors import invalid_field
from lattice_server.core.model import TaskSpec
from lattice_server.core.run.reuse import Earlier
from lattice_server.engine.runs.secrets import SecretStore


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
                if self._lacks(name, given, tenant):
                    field = f'tasks[{index}].environment["{variable}"].secret'
                    text = f"there is no secret {name!r}: neither the caller nor the server has a value of this name"
                    raise invalid_field(field, text)
            for name in spec.services:
                if not self.has_service(name, tenant):
                    raise invalid_field(f"tasks[{index}].services", f"there is no service {name!r}")

    def check_again(self, tasks: Iterable[TaskSpec], earlier: Earlier, given: Mapping[str, str], tenant: str) -> None:
        """Raise InvalidError when a task that is to be run again names a secret that there is not any more."""
        again = (spec for spec in tasks if not earlier.success_of(spec) and not earlier.was_skipped(spec.task_id))
        names = {name for spec in again for _, name in spec.secrets if self._lacks(name, given, tenant)}
        if names:
            text = f"send the secrets {', '.join(sorted(names))} again: their values ended with the run"
            raise invalid_field("secrets", text)

    def _lacks(self, name: str, given: Mapping[str, str], tenant: str) -> bool:
        return name not in given and not self.secrets.has(name, tenant)
