"""Owns the translation of the tasks of a graph to messages of the contract.

Rule: tasks of one definition name one function, which is sent once.
"""

from collections.abc import Collection, Container, Iterable
from functools import cache
from itertools import chain, count

from lattice.v1 import task_pb2, workflow_pb2

from lattice_client.code.freshness import file_at
from lattice_client.convert.inputs import Binder, Store
from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.deferred import UNSET
from lattice_client.graph.environment import Env, fill, values_of
from lattice_client.graph.nodes import LatticeTask
from lattice_client.graph.outputs import Scope

FAILURE_POLICIES = {
    "fail_fast": workflow_pb2.FAILURE_POLICY_FAIL_FAST,
    "finish_independent": workflow_pb2.FAILURE_POLICY_FINISH_INDEPENDENT,
}


async def tasks_of(tasks: Collection[LatticeTask], store: Store, scope: Scope, env: Env) -> workflow_pb2.WorkflowSpec:
    """Return tasks as one message without their code; see `fill_code`. Large inputs are uploaded.

    A task has the variables of `env` that it does not define itself.

    Raises TaskDefinitionError when a task is wired to an output of another run.
    """
    spec, names = workflow_pb2.WorkflowSpec(), _names(tasks)
    for task in tasks:
        message = spec.tasks.add()
        await _fill_task(message, task, names[id(task.definition)], store, scope)
        fill(message.environment, env)
    return spec


def pack_code(tasks: Iterable[LatticeTask]) -> None:
    """Pickle the functions of tasks that changed since they were last pickled. Raises TaskDefinitionError.

    The state of each file is read once, even when several functions need it.
    """
    state_of = cache(file_at)
    for definition in {id(task.definition): task.definition for task in tasks}.values():
        definition.pack(state_of)


def fill_code(spec: workflow_pb2.WorkflowSpec, tasks: Collection[LatticeTask], known: Container[str]) -> None:
    """Replace the code in the message of `tasks`; a function or bundle that the server knows is only named.

    `known` are the digests of both.
    """
    spec.ClearField("functions")
    spec.ClearField("bundles")
    bundles: set[str] = set()
    names = _names(tasks)
    for definition in {id(task.definition): task.definition for task in tasks}.values():
        function, bundle = definition.packed
        name = names[id(definition)]
        if function.digest in known:
            spec.functions[name].digest = function.digest
        else:
            spec.functions[name].CopyFrom(function)
            if bundle is not None and bundle.digest not in bundles and bundle.digest not in known:
                bundles.add(bundle.digest)
                spec.bundles.append(bundle)


def secrets_of(tasks: Iterable[LatticeTask], env: Env) -> dict[str, str]:
    """Return the values of the secrets that tasks and an environment name, as far as this process has them."""
    definitions = {id(task.definition): task.definition for task in tasks}.values()
    return values_of((definition.form.environment for definition in definitions), [env])


def _names(tasks: Iterable[LatticeTask]) -> dict[int, str]:
    """Return the names of the functions of tasks in their message, by the identity of the definition."""
    names: dict[int, str] = {}
    taken: set[str] = set()
    for definition in {id(task.definition): task.definition for task in tasks}.values():
        spellings = chain([definition.name], (f"{definition.name}-{number}" for number in count(2)))
        names[id(definition)] = name = next(name for name in spellings if name not in taken)
        taken.add(name)
    return names


async def task_of(task: LatticeTask, function: str, store: Store, env: Env) -> task_pb2.TaskSpec:
    """Return the message of a task that runs alone. Raises TaskDefinitionError."""
    message = task_pb2.TaskSpec()
    await _fill_task(message, task, function, store, Scope(lambda output: False, ()))
    fill(message.environment, env)
    return message


async def _fill_task(message: task_pb2.TaskSpec, task: LatticeTask, function: str, store: Store, scope: Scope) -> None:
    message.CopyFrom(task.definition.form)
    message.task_id = task.task_id
    message.display_name = task.display_name
    message.function = function
    message.after.extend(task.after)
    message.over = task.over
    if task.condition is not None:
        binder = Binder(f"the condition of task {task.task_id!r}", store, scope)
        binder.fill_reference(message.condition.output, task.condition.output)
        message.condition.negated = task.condition.is_negated
        if task.condition.equals is not UNSET:
            where = f"`equals` in the condition of task {task.task_id!r}"
            binder = Binder(where, store, scope)
            message.condition.equals.CopyFrom(await binder.payload_of(task.condition.equals))
            if message.condition.equals.WhichOneof("content") != "json":
                raise TaskDefinitionError(f"{where} must be a value of JSON, not {task.condition.equals!r}")
    entrypoint = task.definition.entrypoint
    for name, value in task.inputs.items():
        where = f"input {name!r} of task {task.task_id!r}"
        binder = Binder(where, store, scope, is_for_python=not entrypoint or ":" in entrypoint)
        await binder.fill(message.inputs[name], value)
