"""Decides whether a worker or a machine may open a stream. Rule: a refusal says why, and changes no state."""

import logging

from lattice.v1 import worker_pb2

from lattice_server.core.errors import LatticeError
from lattice_server.engine.workers.sessions import Sessions
from lattice_server.rpc import callers
from lattice_server.rpc.hello_validation import check_first, version_refusal
from lattice_server.rpc.machines import Machines

log = logging.getLogger(__name__)


class WorkerAdmission:
    """Admits the streams of `WorkerService.Connect`, until the server stops."""

    def __init__(self, sessions: Sessions, machines: Machines) -> None:
        self._sessions = sessions
        self._machines = machines
        self._is_stopping = False

    def stop(self) -> None:
        """Refuse every stream from now on."""
        self._is_stopping = True

    def refusal(self, first: worker_pb2.ConnectRequest, *, is_local: bool) -> worker_pb2.Close | None:
        """Return why a stream with this first message is refused; None when it is admitted."""
        if (refusal := version_refusal(first)) is not None:
            return refusal
        try:
            check_first(first, is_local=is_local)
        except LatticeError as error:
            return protocol_error(error)
        if first.HasField("hello") and self._machines.has_given_up(first.hello.worker_id):
            text = f"worker {first.hello.worker_id} was away for too long, and another is to replace it"
            return worker_pb2.Close(reason=worker_pb2.CLOSE_REASON_LOST, message=text)
        if self._is_stopping:
            return worker_pb2.Close(reason=worker_pb2.CLOSE_REASON_SHUTDOWN, message="the server stops")
        return self._owner_refusal(first)

    def _owner_refusal(self, first: worker_pb2.ConnectRequest) -> worker_pb2.Close | None:
        """Return the refusal of a subject that may not serve the node; None when it may.

        A node belongs to the subject that registered it until the server forgets the node.
        """
        caller = callers.caller()
        node_id = first.hello.node_id if first.HasField("hello") else first.join.node_id
        owners = {self._sessions.owner_of(node_id, first.hello.worker_id), self._machines.owner_of(node_id)}
        if not caller.credential.may_serve(node_id):
            text = f"this token is not for node {node_id!r}"
        elif owners - {None, caller.subject}:
            text = f"node {node_id!r}, or worker {first.hello.worker_id!r}, is another subject's"
        else:
            return None
        log.info("refused node %r to %r: %s", node_id, caller.subject, text)
        return worker_pb2.Close(reason=worker_pb2.CLOSE_REASON_UNAUTHENTICATED, message=text)


def protocol_error(error: LatticeError) -> worker_pb2.Close:
    """Return the last message to a worker or a machine that broke the protocol."""
    return worker_pb2.Close(reason=worker_pb2.CLOSE_REASON_PROTOCOL_ERROR, message=error.message)
