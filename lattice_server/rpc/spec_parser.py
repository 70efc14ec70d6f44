"""Parses functions, tasks and workflows of callers into specs, and stores their code.

Rule: code is named by the digest of the received bytes, so that a caller's digest can never stand for other code.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from lattice.v1 import payload_pb2, task_pb2, workflow_pb2

from lattice_server.core.errors import invalid_field
from lattice_server.core.model import FailurePolicy, Function, Isolation, Payload, TaskSpec, WorkflowSpec
from lattice_server.core.scheduling.batching import BatchRule
from lattice_server.core.tenancy import EVERYTHING, Reach
from lattice_server.engine.stores.code_store import CodeStore
from lattice_server.rpc.convert.functions import bundle_from_proto, function_from_proto
from lattice_server.rpc.convert.payloads import payload_from_proto
from lattice_server.rpc.convert.tasks import task_from_proto

FAILURE_POLICY_FROM_PROTO = {
    workflow_pb2.FAILURE_POLICY_UNSPECIFIED: FailurePolicy.FAIL_FAST,
    workflow_pb2.FAILURE_POLICY_FAIL_FAST: FailurePolicy.FAIL_FAST,
    workflow_pb2.FAILURE_POLICY_FINISH_INDEPENDENT: FailurePolicy.FINISH_INDEPENDENT,
}


class SpecParser:
    """Checks messages of callers and converts them into specs, with the server's limits and batching rules.

    `least` is the weakest isolation of a task, and that of tasks that name none.
    """

    def __init__(
        self,
        code: CodeStore,
        inline_limit_bytes: int,
        rules: Sequence[BatchRule] = (),
        least: Isolation = Isolation.NONE,
    ) -> None:
        self.code = code
        self.inline_limit_bytes = inline_limit_bytes
        self._rules = rules
        self._least = least

    def functions(
        self, messages: Mapping[str, task_pb2.Function], bundles: Iterable[task_pb2.CodeBundle], reach: Reach
    ) -> dict[str, Function]:
        """Check and store functions and bundles; return the functions by their names in the workflow.

        They are stored for the tenant of `reach`. A digest without code may name code within `reach`. In `messages`
        only the digests are left.

        Raises:
            ExhaustedError: the tenant's code would exceed its limit.
            InvalidError: a digest is not that of the content.
            PreconditionError: a digest without code is unknown; see `CodeStore.get`.
        """
        for index, bundle in enumerate(bundles):
            if bundle.zip:
                digest = f"sha256:{hashlib.sha256(bundle.zip).hexdigest()}"
                if bundle.digest != digest:
                    raise invalid_field(f"bundles[{index}].digest", f"must be that of `zip`, {digest}")
                self.code.put(bundle_from_proto(bundle), reach.tenant)
        found = {}
        for name, message in messages.items():
            found[name] = self._function(message, f'functions["{name}"]', reach)
            message.Clear()
            message.digest = found[name].digest
        return found

    def payloads(self, messages: Mapping[str, payload_pb2.Payload], field: str) -> dict[str, Payload]:
        """Check and return named payloads."""
        return {
            name: payload_from_proto(message, f'{field}["{name}"]', self.inline_limit_bytes)
            for name, message in messages.items()
        }

    def tasks(self, messages: Iterable[task_pb2.TaskSpec], functions: Mapping[str, Function]) -> tuple[TaskSpec, ...]:
        """Check and return tasks, batched as the server's rules say."""
        return tuple(self.task(message, f"tasks[{index}]", functions) for index, message in enumerate(messages))

    def task(self, message: task_pb2.TaskSpec, field: str, functions: Mapping[str, Function]) -> TaskSpec:
        """Check and return one task, as `tasks` does."""
        return task_from_proto(message, field, functions, self.inline_limit_bytes, self._rules, self._least)

    def workflow(self, message: workflow_pb2.WorkflowSpec, tasks: tuple[TaskSpec, ...]) -> WorkflowSpec:
        """Check and return a workflow of tasks that were parsed before."""
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

    def spawned_functions(self, messages: Mapping[str, task_pb2.Function]) -> dict[str, Function]:
        """Check functions of spawned tasks; they are stored when the tasks are added to the run."""
        return {
            name: self._function(message, f'functions["{name}"]', EVERYTHING, is_stored=False)
            for name, message in messages.items()
        }

    def _function(self, message: task_pb2.Function, field: str, reach: Reach, *, is_stored: bool = True) -> Function:
        has_code = message.python.WhichOneof("code") is not None
        if has_code and message.entrypoint:
            raise invalid_field(field, "a function has either an entrypoint or code of its own")
        if not (has_code or message.entrypoint):
            if not message.digest:
                text = "a function needs python.pickle, python.source, entrypoint, or the digest of one sent before"
                raise invalid_field(field, text)
            known: Function = self.code.get(message.digest, reach)
            return known
        function = function_from_proto(message, partial(self.code.get, reach=reach))
        if message.digest not in {"", function.digest}:
            raise invalid_field(f"{field}.digest", f"must be empty or that of the function, {function.digest}")
        return self.code.put(function, reach.tenant) if is_stored else function
