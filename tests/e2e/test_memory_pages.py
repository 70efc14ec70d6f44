"""The memory of a running server and of its worker is on huge pages, where the machine has them."""

from pathlib import Path

from lattice_client import LatticeClient
from lattice_server import huge_pages


def huge_bytes(pid: int) -> int:
    """Return how much private memory of a process is on huge pages."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages"))


def test_server_and_worker_use_huge_pages(client: LatticeClient) -> None:
    if huge_pages.use_huge_pages() == 0:
        return  # This machine has none.
    (node,) = client.nodes()
    for pid in (client.server_info().pid, node.worker_pid):
        # How many pages Linux can move depends on how much of its free memory is in one piece.
        assert huge_bytes(pid) > 0
