"""Owns the references of live runs to code, uploads and artifacts, and the count of their tasks and memory.

Rule: a run references its code and uploads until it ends, and its artifacts until it is evicted.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from lattice_server.core.messages import TaskSucceeded
from lattice_server.core.model import Artifact, Failure, FailureKind, Function, TaskSpec
from lattice_server.core.steps import Steps, stepwise
from lattice_server.engine.runs.admission import Admission
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.stores.artifact_store import ArtifactStore
from lattice_server.engine.stores.code_store import CodeStore

FUNCTION_STEP = 1000


class RunStores:
    """The stores as live runs use them; lives on the main thread."""

    def __init__(self, store: ArtifactStore, code: CodeStore, admission: Admission) -> None:
        self._store = store
        self._code = code
        self._admission = admission

    def hold_code(self, entry: RunEntry, functions: Mapping[str, Function]) -> None:
        """Have a live run reference functions, by digest. Raises ExhaustedError with the reason STORE_FULL."""
        if entry.ended_s is None:
            new = {digest: function for digest, function in functions.items() if digest not in entry.functions}
            self._code.hold(entry.run.tenant, new.values())
            entry.functions |= new

    def hold_artifacts(self, entry: RunEntry, artifacts: Sequence[Artifact], uploader: str) -> None:
        """Have a run reference artifacts; `uploader` is the tenant whose uploads may be among them."""
        if artifacts:
            entry.uploads += self._store.take(artifacts, entry.run.tenant, uploader)
            entry.artifacts += artifacts

    def hold_outputs(self, entry: RunEntry, fact: TaskSucceeded) -> None:
        """Have a run reference the outputs of a task."""
        self.hold_artifacts(entry, list(_artifacts_of(fact)), entry.run.tenant)

    def hold_graph(self, entry: RunEntry, uploader: str) -> None:
        """Have a run reference the artifacts in its graph that are new."""
        artifacts = entry.run.dag.artifacts
        if len(artifacts) > entry.graph_artifacts:
            self.hold_artifacts(entry, artifacts[entry.graph_artifacts :], uploader)
            entry.graph_artifacts = len(artifacts)

    def count(self, entry: RunEntry) -> None:
        """Bring the counts of admission up to date with a run."""
        open_tasks, live_bytes = entry.run.open_tasks, 0 if entry.run.is_terminal else entry.kept_bytes
        self._admission.count(open_tasks - entry.open_tasks, live_bytes - entry.live_bytes, entry.run.tenant)
        entry.open_tasks, entry.live_bytes = open_tasks, live_bytes

    def excess(self, entry: RunEntry) -> Failure | None:
        """Return why a live run takes too much memory; None when it does not."""
        text = self._admission.excess(entry.run.tenant)
        return (
            Failure(FailureKind.RESOURCES, f"the run needs too much of the server's memory: {text}") if text else None
        )

    def release(self, entry: RunEntry) -> None:
        """Release the code and uploads of a run that has ended."""
        self._code.release(entry.run.tenant, entry.functions.values())
        self._store.uploads.release(entry.uploads)
        entry.uploads = []


def functions_of(tasks: Iterable[TaskSpec]) -> Steps[dict[str, Function]]:
    """Return the functions that tasks call, by digest, in steps."""
    found: dict[str, Function] = {}
    for task, is_step in stepwise(tasks, FUNCTION_STEP):
        found[task.function.digest] = task.function
        if is_step:
            yield
    return found


def _artifacts_of(fact: TaskSucceeded) -> Iterator[Artifact]:
    for payload in fact.outputs.values():
        if isinstance(payload.content, Artifact):
            yield payload.content
    for items in fact.split.values():
        for payload in items:
            if isinstance(payload.content, Artifact):
                yield payload.content
