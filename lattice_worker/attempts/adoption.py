"""The leases, reports and questions that a worker keeps over a restart of its server.

Rule: the server chooses the leases to adopt. Reports of the other leases are dropped, and their values are deleted.
"""

from lattice.v1 import worker_pb2

from lattice_worker import convert
from lattice_worker.attempts.questions import Questions
from lattice_worker.session.outbox import Leases
from lattice_worker.store.local_store import LocalStore


def held_leases(leases: Leases, questions: Questions) -> list[worker_pb2.HeldLease]:
    """Return the leases that a server which was started again may adopt."""
    return [
        worker_pb2.HeldLease(lease_id=lease_id, ended=ended, waits=questions.waits(lease_id))
        for lease_id, ended in leases.adoptable().items()
        if not questions.reads_signals(lease_id)
    ]


def begin(
    session_id: str, adopted: frozenset[str], leases: Leases, questions: Questions, local_store: LocalStore
) -> None:
    """Begin a new session with the leases that the server has adopted."""
    reports = leases.reports.unacknowledged()
    leases.welcome(session_id, False, (), adopted)
    for question in questions.reset(adopted):
        # One whose report is not acknowledged is asked by that.
        if not any(report is question for report in reports):
            leases.report(question.lease_id, question)
    for report in reports if adopted else ():
        if report.lease_id not in adopted:
            local_store.drop(convert.artifacts_in(report))
