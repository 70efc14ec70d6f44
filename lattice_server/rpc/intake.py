"""Owns what callers send: turns graphs from the wire into specs, and keeps their code for the next time.

Rule: code is named by the digest of what was received; a name a caller made up never stands for other code.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from lattice.v1 import payload_pb2, task_pb2, workflow_pb2

from lattice_server.core.batching import BatchRule
from lattice_server.core.errors import invalid_field
from lattice_server.core.model import FailurePolicy, Function, Payload, TaskSpec, WorkflowSpec
from lattice_server.engine.code_store import CodeStore
from lattice_server.rpc import convert, definitions

FAILURE_POLICY_FROM_PROTO = {
    workflow_pb2.FAILURE_POLICY_UNSPECIFIED: FailurePolicy.FAIL_FAST,
    workflow_pb2.FAILURE_POLICY_FAIL_FAST: FailurePolicy.FAIL_FAST,
    workflow_pb2.FAILURE_POLICY_FINISH_INDEPENDENT: FailurePolicy.FINISH_INDEPENDENT,
}


class Intake:
    """Checks and translates what callers send."""

    def __init__(self, inline_limit_bytes: int, rules: Sequence[BatchRule] = ()) -> None:
        self.inline_limit_bytes = inline_limit_bytes
        self._rules = rules
        self.code = CodeStore()

    def functions(
        self, messages: Mapping[str, task_pb2.Function], bundles: Iterable[task_pb2.CodeBundle]
    ) -> dict[str, Function]:
        """Check and keep functions and bundles; return the functions by their names in the workflow.

        What stays in `messages` is their digests, so that requests that mean the same are the same.
        """
        for index, bundle in enumerate(bundles):
            if bundle.zip:
                digest = f"sha256:{hashlib.sha256(bundle.zip).hexdigest()}"
                if bundle.digest != digest:
                    raise invalid_field(f"bundles[{index}].digest", f"must be that of `zip`, {digest}")
                self.code.put(digest, task_pb2.CodeBundle(digest=digest, zip=bundle.zip), len(bundle.zip))
        found = {}
        for name, message in messages.items():
            found[name] = self._function(message, f'functions["{name}"]')
            message.Clear()
            message.digest = found[name].digest
        return found

    def payloads(self, messages: Mapping[str, payload_pb2.Payload], field: str) -> dict[str, Payload]:
        """Check and return named payloads."""
        return {
            name: convert.payload_from_proto(message, f'{field}["{name}"]', self.inline_limit_bytes)
            for name, message in messages.items()
        }

    def tasks(self, messages: Iterable[task_pb2.TaskSpec], functions: Mapping[str, Function]) -> tuple[TaskSpec, ...]:
        """Check and return tasks, batched as the server's rules say."""
        return definitions.tasks_from_proto(messages, functions, self.inline_limit_bytes, self._rules)

    def task(self, message: task_pb2.TaskSpec, field: str, functions: Mapping[str, Function]) -> TaskSpec:
        """Check and return one task, as `tasks` does."""
        return definitions.task_from_proto(message, field, functions, self.inline_limit_bytes, self._rules)

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

    def _function(self, message: task_pb2.Function, field: str) -> Function:
        has_code = message.python.WhichOneof("code") is not None
        if has_code and message.entrypoint:
            raise invalid_field(field, "a function has either an entrypoint or code of its own")
        if not (has_code or message.entrypoint):
            if not message.digest:
                text = "a function needs python.pickle, python.source, entrypoint, or the digest of one sent before"
                raise invalid_field(field, text)
            known: Function = self.code.get(message.digest)
            return known
        function = definitions.function_from_proto(message, self.code.get)
        if message.digest not in {"", function.digest}:
            raise invalid_field(f"{field}.digest", f"must be empty or that of the function, {function.digest}")
        self.code.put(function.digest, function, message.ByteSize())
        return function
