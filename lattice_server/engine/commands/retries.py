"""Owns the settings of a run that retries an earlier one. Rule: they are the same, except for secrets."""

from collections.abc import Mapping

from lattice_server.core.errors import PreconditionError
from lattice_server.core.model import Payload, WorkflowSpec
from lattice_server.core.run.reuse import Earlier, workflow_of
from lattice_server.engine.commands.starter import StartSettings
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.runs.requirements import Requirements
from lattice_server.engine.stores.artifact_store import ArtifactStore


def retry_of(
    entry: RunEntry, run_id: str, store: ArtifactStore, requirements: Requirements, secrets: Mapping[str, str]
) -> tuple[WorkflowSpec, Mapping[str, Payload], StartSettings]:
    """Return the workflow, the parameters and the settings of a run that retries one.

    Raises PreconditionError when that one has not ended, InvalidError when a secret is missing.
    """
    old = entry.run
    if not old.is_terminal:
        text = f"run {run_id!r} is {old.state.value}; it can be retried when it has ended"
        raise PreconditionError("RUN_NOT_ENDED", text)
    spec = workflow_of(old.spec, old.tasks)
    earlier = Earlier(run_id, old.tasks, lambda artifact: store.held(artifact.artifact_id) is not None)
    requirements.check_again(spec.tasks, earlier, secrets, old.tenant)
    settings = StartSettings(
        labels=entry.labels,
        priority=old.priority,
        tenant=old.tenant,
        workflow_id=old.workflow_id,
        timeout_s=entry.timeout_s,
        earlier=earlier,
        secrets=secrets,
    )
    return spec, old.parameters, settings
