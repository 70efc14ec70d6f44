"""The runner's end of the claim pipe; `lattice_worker.pool.pipelining` describes it.

Rule: an invocation whose claim the agent has read is not run.
"""

import os


class Claims:
    """The claims that this process has read; the agent reads the same pipe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._last = 0

    def owns(self, number: int) -> bool:
        """Whether this process may run the invocation with this claim. Called in the order of the claims."""
        while self._last < number:
            try:
                self._last = int.from_bytes(os.read(self._descriptor, 8), "little")
            except BlockingIOError:
                return False
        return self._last == number
