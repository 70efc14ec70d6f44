"""Owns which tests run in one process when there are several, and which of those groups begin first.

The tests of a file run in one process. The tests that need a Ray on this machine's own network are one group, so that
there are at most two Rays at once, this and that of the cluster: a Ray gives up when its start takes 30 s. (The mark
`xdist_group` has no effect with pytest-xdist 3.8 and pytest 9.2.)
"""

from xdist.scheduler import LoadScopeScheduling

STARTS_RAY = "tests that start a Ray"
ON_RAY = "tests on the server on Ray"
# Follows those: its first test on the other server ends that one, which would take a tenth of a processor.
ON_THE_OTHER = "tests/e2e/test_runs.py"
STARTING = tuple(
    f"tests/e2e/test_{name}" for name in ("ray_cluster.py::", "ray_beside.py::", "examples.py::test_the_demo")
)
# The longest; most of them wait most of the time.
FIRST = (
    "tests/e2e/test_cluster_on_ray.py",
    STARTS_RAY,
    ON_RAY,
    ON_THE_OTHER,
    "tests/e2e/test_transformers.py",
    "tests/e2e/test_cluster.py",
    "tests/e2e/test_security.py",
    "tests/e2e/test_examples.py",
    "tests/e2e/test_failures.py",
    "tests/e2e/test_processes.py",
)


def kind_of(test: str) -> str:
    """Return the group of a test by its id: its file, or one of the two groups for Ray."""
    file, _, name = test.partition("::")
    if test.startswith(STARTING):
        return STARTS_RAY
    return ON_RAY if file.startswith("tests/e2e/") and ("[ray]" in name or "[ray-" in name) else file


def rank_of(test: str) -> int:
    """Return when a test is to begin; those of equal rank keep their order."""
    kind = kind_of(test)
    return FIRST.index(kind) if kind in FIRST else len(FIRST)


class Groups(LoadScopeScheduling):  # type: ignore[misc]
    """Gives a whole group to a process that has nothing left to do."""

    def _split_scope(self, nodeid: str) -> str:
        kind = kind_of(nodeid)
        return STARTS_RAY if kind in {ON_RAY, ON_THE_OTHER} else kind
