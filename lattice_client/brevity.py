"""Owns the memory of which runs are short. Rule: it decides how a result is asked for, never what it is.

A run that ends within milliseconds costs one call when its result is waited for at once; one that takes longer should
not make its caller wait to go on.
"""

import time
from collections import OrderedDict

from lattice.v1 import run_pb2

Kind = tuple[frozenset[str], int]

BRIEF_S = 0.010
WAIT_S = 0.020
MAX_KINDS = 1000


class Brevity:
    """How long runs took lately, by the code they call and the number of their tasks."""

    def __init__(self) -> None:
        self._durations: OrderedDict[Kind, float] = OrderedDict()

    def is_brief(self, kind: Kind) -> bool:
        """Whether runs of a kind are known to be short."""
        return self._durations.get(kind, BRIEF_S) < BRIEF_S

    def learn(self, kind: Kind, run: run_pb2.Run) -> None:
        """Note how long a run took, or has taken so far."""
        ended_ns = run.end_time.ToNanoseconds() if run.HasField("end_time") else time.time_ns()
        took_s = (ended_ns - run.create_time.ToNanoseconds()) / 1e9
        known = self._durations.get(kind, took_s)
        self._durations[kind] = known + 0.3 * (took_s - known)
        self._durations.move_to_end(kind)
        if len(self._durations) > MAX_KINDS:
            self._durations.popitem(last=False)
