"""Uploads of artifacts that the server asks for, each over a call of its own."""

import logging
import os
from collections.abc import AsyncIterator

import grpc
from lattice.v1 import worker_pb2, worker_pb2_grpc

from lattice_worker import background
from lattice_worker.session.outbox import CHUNK_BYTES
from lattice_worker.store.local_store import LocalStore

log = logging.getLogger(__name__)


class Uploads:
    """Starts uploads."""

    def __init__(self, local_store: LocalStore) -> None:
        self._local_store = local_store

    def start(self, workers: "worker_pb2_grpc.WorkerServiceAsyncStub", wanted: worker_pb2.SendArtifact) -> None:
        """Begin an upload."""
        # The end of the call, or of the stream, tells the reader.
        background.start(send(workers, wanted, self._local_store), background.only_log)


async def send(
    workers: "worker_pb2_grpc.WorkerServiceAsyncStub",
    wanted: worker_pb2.SendArtifact,
    local_store: LocalStore,
) -> None:
    """Send the server an artifact of this node; one that cannot be read is sent without its bytes."""

    async def chunks() -> AsyncIterator[worker_pb2.UploadArtifactRequest]:
        first = worker_pb2.UploadArtifactRequest(transfer_id=wanted.transfer_id)
        try:
            with local_store.open(wanted.artifact_id) as file:
                first.size_bytes = max(0, file.seek(0, os.SEEK_END) - wanted.offset)
                yield first
                file.seek(wanted.offset)
                # Reads from memory.
                while data := file.read(CHUNK_BYTES):
                    yield worker_pb2.UploadArtifactRequest(data=data)
        except FileNotFoundError:
            yield first
            yield worker_pb2.UploadArtifactRequest(not_found=True)
        except OSError as error:
            log.warning("artifact %s cannot be read: %s", wanted.artifact_id, error)
            yield first

    try:
        await workers.UploadArtifact(chunks())
    except grpc.aio.AioRpcError as error:
        log.info("artifact %s was not sent: %s", wanted.artifact_id, error.details())
