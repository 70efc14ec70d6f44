"""Owns which artifacts a worker's token may read. Rule: only the inputs of leases that the subject's workers hold."""

from collections import Counter
from collections.abc import Collection, Iterable
from weakref import WeakKeyDictionary, WeakSet

from lattice_server.core.messages import Assign
from lattice_server.core.model import Artifact, Payload
from lattice_server.core.references import leaves
from lattice_server.engine.workers.outbox import Session


class _Inputs:
    """The artifacts among the inputs of one session's leases, and how many of its leases need each."""

    def __init__(self) -> None:
        self.leases: dict[str, tuple[int, frozenset[str]]] = {}
        self.needed: Counter[str] = Counter()


class AssignedArtifacts:
    """The artifacts that each subject's workers need; lives on the main thread.

    A session's artifacts are forgotten with the session, which the engine forgets when the worker is lost.
    """

    def __init__(self) -> None:
        self._by_session: WeakKeyDictionary[Session, _Inputs] = WeakKeyDictionary()
        self._sessions: dict[str, WeakSet[Session]] = {}

    def may_read(self, subject: str, artifact_id: str) -> bool:
        """Whether a lease of one of the subject's workers has an artifact among its inputs."""
        sessions = self._sessions.get(subject, ())
        return any(self._by_session[session].needed[artifact_id] for session in sessions)

    def assign(self, session: Session, assignments: Iterable[Assign]) -> None:
        """Add the inputs of leases that are sent to a session's worker."""
        for effect in assignments:
            found = frozenset(_artifacts_of(effect))
            if not found:
                continue
            inputs = self._by_session.get(session)
            if inputs is None:
                inputs = self._by_session[session] = _Inputs()
                self._sessions.setdefault(session.connection.subject, WeakSet()).add(session)
            inputs.leases[effect.lease_id] = effect.sequence, found
            inputs.needed.update(found)

    def release(self, session: Session, held_lease_ids: Collection[str], sequence: int) -> None:
        """Remove the leases up to an assignment's number that a worker no longer holds."""
        inputs = self._by_session.get(session)
        if inputs is None:
            return
        ended = [
            lease_id
            for lease_id, (number, _) in inputs.leases.items()
            if number <= sequence and lease_id not in held_lease_ids
        ]
        for lease_id in ended:
            _, artifact_ids = inputs.leases.pop(lease_id)
            inputs.needed.subtract(artifact_ids)
        if ended:
            inputs.needed = +inputs.needed


def _artifacts_of(effect: Assign) -> Iterable[str]:
    for attempt in effect.attempts:
        for binding in attempt.inputs.values():
            for leaf in leaves(binding):
                if isinstance(leaf, Payload) and isinstance(leaf.content, Artifact):
                    yield leaf.content.artifact_id
