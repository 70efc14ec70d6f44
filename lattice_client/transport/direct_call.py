"""Owns bidirectional streams without threads of gRPC's. Rule: the sender of a message writes it, and the reader waits.

gRPC's own blocking streams hand each message to a thread that sends, and each answer to a thread that waits, so that a
request and its answer cross three threads more. gRPC reads streams of responses without threads, but has no public
function that starts such a bidirectional stream: this module uses the classes below that function.
"""

import threading
from collections import deque
from typing import Any, Generic, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError
from grpc._common import CYGRPC_STATUS_CODE_TO_STATUS_CODE, decode
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from lattice_client.transport.tracing import Headers

Q = TypeVar("Q")
R = TypeVar("R")
_LOST = cygrpc.StatusCode.cancelled, b"the stream was interrupted", None


class StreamError(grpc.RpcError):
    """The status of a stream that failed."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: Any = None) -> None:
        super().__init__(details)
        self._status = code, details, metadata

    def code(self) -> grpc.StatusCode:
        """Return the status code."""
        return self._status[0]

    def details(self) -> str:
        """Return the text of the status."""
        return self._status[1]

    def trailing_metadata(self) -> Any:
        """Return the headers at the end of the stream, as pairs."""
        return self._status[2]


class DirectCall(Generic[Q, R]):
    """A bidirectional stream; `method` is gRPC's callable for it, without interceptors.

    One thread at a time may read; the other methods are for any thread. gRPC keeps the call until all its events were
    taken: by `read`, up to the end of the stream, or by `release`.

    Raises AttributeError, TypeError when this version of gRPC is built differently, ValueError on a closed channel.
    """

    def __init__(self, method: Any, headers: Headers) -> None:
        self._serialize, self._deserialize = method._request_serializer, method._response_deserializer
        self._lock = threading.Lock()
        self._taking = threading.Lock()  # Held by the thread that waits for an event.
        self._unsent: deque[bytes] = deque()
        self._received: deque[bytes] = deque()
        self._is_sending = self._is_receiving = self._is_at_end = False
        self._status: tuple[int, Any, Any] = _LOST
        starting = (
            (cygrpc.SendInitialMetadataOperation(headers or None, 0), cygrpc.ReceiveStatusOnClientOperation(0)),
            (cygrpc.ReceiveInitialMetadataOperation(0),),
        )
        self._due = len(starting)
        self._call = method._channel.segregated_call(
            cygrpc.PropagationConstants.GRPC_PROPAGATE_DEFAULTS,
            method._method,
            None,  # The host.
            None,  # The deadline.
            headers or None,
            None,  # The credentials.
            [(operations, None) for operations in starting],
            method._context,
            method._registered_call_handle,
        )

    def send(self, message: Q) -> None:
        """Write a message, after those before it. A message of an ended stream is dropped."""
        serialized = self._serialize(message)
        try:
            with self._lock:
                self._unsent.append(serialized)
                self._write()
        except BaseException:
            self.cancel()  # A signal handler raised. The messages after this one could wait for ever.
            raise

    def read(self) -> R | None:
        """Wait for the next message; None at the end of the stream.

        Raises StreamError. After the exception of a signal handler, the stream has ended.
        """
        while not self._received:
            with self._lock:
                if not self._due:
                    break
                if not self._is_receiving and not self._is_at_end:
                    self._is_receiving = True
                    self._start(cygrpc.ReceiveMessageOperation(0))
            self._take()
        if not self._received:
            self._raise_status()
            return None
        try:
            return cast(R, self._deserialize(self._received.popleft()))
        except DecodeError as error:
            raise StreamError(grpc.StatusCode.INTERNAL, f"a message of the server cannot be read: {error}") from None

    def cancel(self) -> None:
        """End the stream."""
        self._call.cancel(cygrpc.StatusCode.cancelled, "cancelled by this client")

    @property
    def is_kept(self) -> bool:
        """Whether gRPC still keeps the call."""
        return self._due > 0

    def release(self) -> None:
        """Take the last events of a stream that was cancelled, unless a thread reads it."""
        while self._due and not self._taking.locked():
            self._take()

    def _start(self, operation: Any) -> None:
        """Start an operation, which has an event; on an ended stream nothing happens."""
        # One expression: if a signal handler raises meanwhile, an event is left, which costs memory. An event too many
        # would be waited for after gRPC has freed the queue of events.
        self._due += self._call.operate((operation,), None)

    def _write(self) -> None:
        if self._unsent and not self._is_sending:
            self._is_sending = True
            self._start(cygrpc.SendMessageOperation(self._unsent.popleft(), 0))

    def _take(self) -> None:
        """Wait for an event, unless another thread took the last one."""
        with self._taking:
            with self._lock:
                if not self._due:
                    return
            try:
                event = self._call.next_event()
            except BaseException:
                self._due = 0  # A signal handler raised, and gRPC has freed the call.
                raise
            with self._lock:
                self._due -= 1
                for operation in event.batch_operations:
                    self._note(operation)

    def _note(self, operation: Any) -> None:
        kind = operation.type()
        if kind == cygrpc.OperationType.receive_message:
            self._is_receiving = False
            if (message := operation.message()) is None:
                self._is_at_end = True
            else:
                self._received.append(message)
        elif kind == cygrpc.OperationType.send_message:
            self._is_sending = False
            self._write()
        elif kind == cygrpc.OperationType.receive_status_on_client:
            self._is_at_end = True
            self._status = operation.code(), operation.details(), operation.trailing_metadata()

    def _raise_status(self) -> None:
        """Raise the error of a stream that failed."""
        number, details, metadata = self._status
        code = CYGRPC_STATUS_CODE_TO_STATUS_CODE.get(number, grpc.StatusCode.UNKNOWN)
        if code is not grpc.StatusCode.OK:
            raise StreamError(code, decode(details or b""), metadata)
