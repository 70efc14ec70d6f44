"""Owns the ids by which runs and tasks are named in calls. Rule: a pickled run is its id, without a connection."""

from types import MappingProxyType

from lattice_client.convert.results import Declared
from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.nodes import LatticeTask
from lattice_client.graph.outputs import TaskOutput


class RunId(str):
    """The id of a run. A copy or a pickle of it is a plain text.

    `declared` are the names of the outputs of its tasks in the order of their declaration, as far as they are known.
    """

    declared: Declared = MappingProxyType({})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        # A run refers to a connection, which cannot be sent to a task; its id can.
        return str, (str(self),)

    @property
    def ends_with_caller(self) -> bool:
        """Whether the server cancels the run when this process ends."""
        return False

    @property
    def run_id(self) -> str:
        """The run's id as a plain text."""
        return str(self)


def task_id_of(task: LatticeTask | TaskOutput | str) -> str:
    """Return the id of a task, given the task, its id or one of its outputs. Raises TaskDefinitionError for others."""
    if isinstance(task, str):
        return task
    if not isinstance(task, LatticeTask | TaskOutput):
        text = "a task of a run is named by itself, its id or one of its outputs, not by"
        raise TaskDefinitionError(f"{text} {task!r}")
    return task.task_id
