"""How much processor time the processes of one sandbox have used together.

Rule: a process that has ended counts too, also when its parent did not wait for it.
"""

import contextlib
import os
from pathlib import Path

from lattice_worker.sandbox.memory import tree

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
# Fields of /proc/PID/stat after the name, from 0: user and system time of the process, then of its children that ended
# and were waited for, and the time at which it started.
OWN, OF_CHILDREN, STARTED = slice(11, 13), slice(13, 15), 19


class ProcessorTime:
    """The processor time of a process and all below it, measured now and then."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        # By process: a number may come to name another process, which starts later.
        self._seen: dict[tuple[int, str], int] = {}

    def used_s(self) -> float:
        """Return the time used so far, in seconds.

        The kernel adds the time of a child to its parent, unless the parent ignores the ends of its children. So the
        times of all processes ever seen are added up as well, and the larger sum counts. A child that its parent does
        not wait for, and that lives between two measurements, is missing.
        """
        waited_for = 0
        for pid in tree(self._pid):
            with contextlib.suppress(OSError):  # It has ended meanwhile.
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                own = sum(map(int, fields[OWN]))
                waited_for += own + sum(map(int, fields[OF_CHILDREN]))
                self._seen[pid, fields[STARTED]] = own
        return max(waited_for, sum(self._seen.values())) * TICK_S
