"""Owns what callers send: turns graphs from the wire into specs, and keeps their code for the next time.

Rule: code is named by the digest of what was received; a name a caller made up never stands for other code.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from lattice.v1 import payload_pb2, task_pb2, workflow_pb2

from lattice_server.core.errors import invalid_field
from lattice_server.core.model import FailurePolicy, Function, Payload, TaskSpec, WorkflowSpec
from lattice_server.core.scheduling.batching import BatchRule
from lattice_server.core.tenancy import EVERYTHING, Reach
from lattice_server.engine.code_store import CodeStore
from lattice_server.rpc.convert import payloads, tasks

FAILURE_POLICY_FROM_PROTO = {
    workflow_pb2.FAILURE_POLICY_UNSPECIFIED: FailurePolicy.FAIL_FAST,
    workflow_pb2.FAILURE_POLICY_FAIL_FAST: FailurePolicy.FAIL_FAST,
    workflow_pb2.FAILURE_POLICY_FINISH_INDEPENDENT: FailurePolicy.FINISH_INDEPENDENT,
}


class Intake:
    """Checks and translates what callers send."""

    def __init__(self, code: CodeStore, inline_limit_bytes: int, rules: Sequence[BatchRule] = ()) -> None:
        self.code = code
        self.inline_limit_bytes = inline_limit_bytes
        self._rules = rules

    def functions(
        self, messages: Mapping[str, task_pb2.Function], bundles: Iterable[task_pb2.CodeBundle], reach: Reach
    ) -> dict[str, Function]:
        """Check and keep functions and bundles of a tenant; return the functions by their names in the workflow.

        They are kept for the tenant of `reach`, which also says whose code a digest alone may name. What stays in
        `messages` is their digests.

        Raises:
            ExhaustedError: the tenant has as much code as it may.
            InvalidError, PreconditionError: see `CodeStore.get`; a digest is wrong, or of nothing that is known.
        """
        for index, bundle in enumerate(bundles):
            if bundle.zip:
                digest = f"sha256:{hashlib.sha256(bundle.zip).hexdigest()}"
                if bundle.digest != digest:
                    raise invalid_field(f"bundles[{index}].digest", f"must be that of `zip`, {digest}")
                self.code.put(tasks.bundle_from_proto(bundle), reach.tenant)
        found = {}
        for name, message in messages.items():
            found[name] = self._function(message, f'functions["{name}"]', reach)
            message.Clear()
            message.digest = found[name].digest
        return found

    def payloads(self, messages: Mapping[str, payload_pb2.Payload], field: str) -> dict[str, Payload]:
        """Check and return named payloads."""
        return {
            name: payloads.payload_from_proto(message, f'{field}["{name}"]', self.inline_limit_bytes)
            for name, message in messages.items()
        }

    def tasks(self, messages: Iterable[task_pb2.TaskSpec], functions: Mapping[str, Function]) -> tuple[TaskSpec, ...]:
        """Check and return tasks, batched as the server's rules say."""
        return tasks.tasks_from_proto(messages, functions, self.inline_limit_bytes, self._rules)

    def task(self, message: task_pb2.TaskSpec, field: str, functions: Mapping[str, Function]) -> TaskSpec:
        """Check and return one task, as `tasks` does."""
        return tasks.task_from_proto(message, field, functions, self.inline_limit_bytes, self._rules)

    def workflow(self, message: workflow_pb2.WorkflowSpec, tasks: tuple[TaskSpec, ...]) -> WorkflowSpec:
        """Check and return a workflow of tasks that were taken in before."""
        policy = FAILURE_POLICY_FROM_PROTO.get(message.failure_policy)
        if policy is None:
            raise invalid_field("failure_policy", f"there is no failure policy {message.failure_policy}")
        message.ClearField("bundles")
        return WorkflowSpec(
            tasks=tasks,
            display_name=message.display_name,
            parameters=self.payloads(message.parameters, "parameters"),
            failure_policy=policy,
        )

    def spawned(self, messages: Mapping[str, task_pb2.Function]) -> dict[str, Function]:
        """Check functions that a running task named; they are kept once the tasks that call them belong to its run."""
        return {
            name: self._function(message, f'functions["{name}"]', EVERYTHING, is_kept=False)
            for name, message in messages.items()
        }

    def _function(self, message: task_pb2.Function, field: str, reach: Reach, *, is_kept: bool = True) -> Function:
        has_code = message.python.WhichOneof("code") is not None
        if has_code and message.entrypoint:
            raise invalid_field(field, "a function has either an entrypoint or code of its own")
        if not (has_code or message.entrypoint):
            if not message.digest:
                text = "a function needs python.pickle, python.source, entrypoint, or the digest of one sent before"
                raise invalid_field(field, text)
            known: Function = self.code.get(message.digest, reach)
            return known
        function = tasks.function_from_proto(message, partial(self.code.get, reach=reach))
        if message.digest not in {"", function.digest}:
            raise invalid_field(f"{field}.digest", f"must be empty or that of the function, {function.digest}")
        return self.code.put(function, reach.tenant) if is_kept else function
