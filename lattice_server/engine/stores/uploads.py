"""Owns the count of clients' uploads, and the time for which one waits to be named by a run or a workflow.

Rule: an upload counts for its tenant while it waits to be named, and while a stored workflow or a live run names it. An
upload that is over the bound is refused; none is evicted to make room.
"""

import asyncio
from collections.abc import Callable, Iterable

from lattice_server.core.model import Artifact
from lattice_server.engine.stores.usage import Bound, Usage

Name = tuple[str, str]  # The tenant that uploaded it, and its id.


class Uploads:
    """The uploads of all tenants; lives on the main thread.

    `on_timeout` is called with each upload that waited for too long, and its tenant.
    """

    def __init__(self, bound: Bound, ttl_s: float, on_timeout: Callable[[Artifact, str], None]) -> None:
        self.usage = Usage("uploads", bound)
        self._ttl_s = ttl_s
        self._on_timeout = on_timeout
        # Equal uploads have one timer each.
        self._waiting: dict[Name, list[asyncio.TimerHandle]] = {}

    def receive(self, tenant: str, size: int) -> None:
        """Count bytes of an upload that is on its way. Raises ExhaustedError with the reason STORE_FULL."""
        if (refusal := self.usage.refusal(tenant, size)) is not None:
            raise refusal
        self.usage.add(tenant, size)

    def forget(self, tenant: str, size: int) -> None:
        """Count the bytes of an upload no longer: it broke, or it has arrived."""
        self.usage.add(tenant, -size)

    def wait(self, tenant: str, artifact: Artifact) -> None:
        """Have an upload that has arrived wait to be named."""
        name = (tenant, artifact.artifact_id)
        self.usage.hold(*name, artifact.size_bytes)
        timer = asyncio.get_running_loop().call_later(self._ttl_s, self._time_out, tenant, artifact)
        self._waiting.setdefault(name, []).append(timer)

    def take(self, uploader: str, artifacts: Iterable[Artifact]) -> tuple[list[Name], list[Artifact]]:
        """Reference the artifacts that a tenant uploaded, for a run or a workflow that names them.

        Of equal uploads that wait, one waits no longer: others may be for another run.

        Returns:
            The names of the uploads, to be given to `release`; and the artifacts among them that wait no longer.
        """
        held: list[Name] = []
        named: list[Artifact] = []
        for artifact in artifacts:
            name = (uploader, artifact.artifact_id)
            if not self.usage.holds(*name):
                continue
            self.usage.hold(*name, artifact.size_bytes)
            held.append(name)
            if artifact not in named and name in self._waiting:
                named.append(artifact)
                self._stop_waiting(name).cancel()
        return held, named

    def release(self, names: Iterable[Name]) -> None:
        """Release the references that `take` added."""
        for name in names:
            self.usage.release(*name)

    def _time_out(self, tenant: str, artifact: Artifact) -> None:
        self._stop_waiting((tenant, artifact.artifact_id))
        self._on_timeout(artifact, tenant)

    def _stop_waiting(self, name: Name) -> asyncio.TimerHandle:
        waiting = self._waiting[name]
        timer = waiting.pop(0)
        if not waiting:
            del self._waiting[name]
        self.usage.release(*name)
        return timer
