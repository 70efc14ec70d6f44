"""The head as a worker sees it: a real server of the contract whose every word a test chooses."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import cloudpickle
import grpc
from google.protobuf.duration_pb2 import Duration
from lattice.v1 import payload_pb2, resources_pb2, task_pb2, worker_pb2, worker_pb2_grpc

from lattice_worker.runner.encoding.values import decode_value, encode_value

LIMIT_BYTES = 100_000
MESSAGE_LIMIT_BYTES = 4 * 1024 * 1024  # What gRPC takes unless told otherwise.
TIMEOUT_S = 60.0
PROGRAM = ("-m", "lattice_worker")


class Stream:
    """One stream of the worker."""

    def __init__(self, credentials: str = "") -> None:
        self.credentials = credentials
        self.requests: asyncio.Queue[worker_pb2.ConnectRequest] = asyncio.Queue()
        self.responses: asyncio.Queue[worker_pb2.ConnectResponse | None] = asyncio.Queue()
        self.is_over = asyncio.Event()
        self.reports: list[worker_pb2.Report] = []
        self.code: dict[str, task_pb2.Function] = {}
        self._unread: list[worker_pb2.Report] = []

    async def hello(self) -> worker_pb2.Hello:
        """Return the first message of the worker."""
        return (await self.requests.get()).hello

    def say(self, **message: Any) -> None:
        """Send one message."""
        self.responses.put_nowait(worker_pb2.ConnectResponse(**message))

    def welcome(
        self,
        session_id: str = "s1",
        resumed: bool = False,
        drop: tuple[str, ...] = (),
        inline_limit_bytes: int = LIMIT_BYTES,
        drop_artifacts: tuple[str, ...] = (),
        question_limit_bytes: int = LIMIT_BYTES,
        chunk_limit_bytes: int = LIMIT_BYTES,
    ) -> None:
        """Accept the worker."""
        message = worker_pb2.Welcome(
            session_id=session_id,
            resumed=resumed,
            heartbeat_interval=Duration(seconds=5),
            session_ttl=Duration(seconds=30),
            drop_lease_ids=drop,
            drop_artifact_ids=drop_artifacts,
            inline_limit_bytes=inline_limit_bytes,
            log_limit_bytes=LIMIT_BYTES,
            message_limit_bytes=MESSAGE_LIMIT_BYTES,
            question_limit_bytes=question_limit_bytes,
            chunk_limit_bytes=chunk_limit_bytes,
        )
        self.say(welcome=message)

    def assign(
        self, lease_id: str, function: Callable[..., Any], *, slot: int = 1, is_async: bool = False, **more: Any
    ) -> worker_pb2.Assignment:
        """Assign a call of `function`; `inputs` are values or payloads, `more` fields of the assignment."""
        inputs = {name: payload_pb2.Binding(payload=payload_of(v)) for name, v in more.pop("inputs", {}).items()}
        inputs |= more.pop("bindings", {})
        attempt = worker_pb2.Attempt(run_id="r", task_id=lease_id, number=1, inputs=inputs)
        assignment = worker_pb2.Assignment(
            lease_id=lease_id,
            slot=slot,
            function_digest=f"sha256:{uuid4().hex}",
            outputs=["out"],
            **{"isolation": resources_pb2.ISOLATION_NONE, "attempts": [attempt]} | more,
        )
        code = task_pb2.Function(
            digest=assignment.function_digest,
            python=task_pb2.PythonFunction(
                pickle=cloudpickle.dumps(function),
                call_style=task_pb2.CALL_STYLE_KEYWORDS,
                return_style=task_pb2.RETURN_STYLE_VALUE,
                concurrency=task_pb2.CONCURRENCY_ASYNC if is_async else task_pb2.CONCURRENCY_PROCESS,
            ),
        )
        self.code[code.digest] = code
        self.say(functions=[code], assignments=[assignment])
        return assignment

    async def report(self) -> worker_pb2.Report:
        """Return the next report."""
        while not self._unread:
            self._unread = list((await self.requests.get()).reports)
        report = self._unread.pop(0)
        self.reports.append(report)
        return report

    async def asked(self) -> list[str]:
        """Return the digests of the next message that asks for code; reports that come before are left out."""
        while not (digests := list((await self.requests.get()).unknown_digests)):
            pass
        return digests

    async def until(self, lease_id: str, *facts: str) -> worker_pb2.Report:
        """Read reports up to one of a lease that tells one of these facts."""
        while True:
            report = await self.report()
            if report.lease_id == lease_id and report.WhichOneof("fact") in facts:
                return report

    async def end(self, lease_id: str) -> worker_pb2.Report:
        """Read reports up to the end of a lease."""
        return await self.until(lease_id, "succeeded", "failed", "returned")

    async def value(self, lease_id: str) -> Any:
        """Read reports up to the end of a lease; return what its function returned."""
        report = await self.end(lease_id)
        assert report.WhichOneof("fact") == "succeeded", report.failed.failure
        payload = report.succeeded.outputs["out"]
        return decode_value(payload.media_type, payload.json.encode() or payload.data)

    def logs(self, lease_id: str) -> str:
        """Return the output of a lease that has been reported so far."""
        return "".join(report.log.text for report in self.reports if report.lease_id == lease_id)

    def of(self, lease_id: str) -> list[str | None]:
        """Return the facts reported of a lease so far."""
        return [report.WhichOneof("fact") for report in self.reports if report.lease_id == lease_id]

    def drop(self) -> None:
        """End the stream without `Close`."""
        self.responses.put_nowait(None)


class Head(worker_pb2_grpc.WorkerServiceServicer):
    """Takes streams; the test speaks on them."""

    def __init__(self) -> None:
        self.streams: asyncio.Queue[Stream] = asyncio.Queue()
        self.open: set[Stream] = set()
        self.address = ""

    async def Connect(
        self, request_iterator: AsyncIterator[worker_pb2.ConnectRequest], context: Any
    ) -> AsyncIterator[worker_pb2.ConnectResponse]:
        """Hold one stream."""
        stream = Stream(str(dict(context.invocation_metadata()).get("authorization", "")))

        async def read() -> None:
            async for request in request_iterator:
                stream.requests.put_nowait(request)

        reader = asyncio.create_task(read())
        self.open.add(stream)
        self.streams.put_nowait(stream)
        try:
            while (response := await stream.responses.get()) is not None:
                yield response
        finally:
            reader.cancel()
            self.open.discard(stream)
            stream.is_over.set()

    async def dialled(self) -> tuple[Stream, worker_pb2.Hello]:
        """Wait for the worker's next stream; return it and its hello."""
        stream = await self.streams.get()
        return stream, await stream.hello()

    async def dialled_anew(self) -> tuple[Stream, worker_pb2.Hello]:
        """End the streams of the worker; return its next one and that one's hello."""
        for stream in [*self.open]:
            stream.drop()
            await stream.is_over.wait()
        while (stream := await self.streams.get()).is_over.is_set():
            pass
        return stream, await stream.hello()


@dataclass
class Pair:
    """A head and the worker that dials it, on a stream that is welcome."""

    head: Head
    process: asyncio.subprocess.Process
    stream: Stream
    hello: worker_pb2.Hello


@asynccontextmanager
async def pair(folder: Path | None, *flags: str, program: Sequence[str] = PROGRAM) -> AsyncIterator[Pair]:
    """A head and one worker of two CPUs while the block runs; without a folder it has a store of its own.

    `program` are arguments of Python that run the command of a worker.
    """
    head, server = Head(), grpc.aio.server()
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(head, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    command = [sys.executable, *program, "--addr", f"127.0.0.1:{port}", "--worker-id", "w"]
    command += ["--node-id", "n", "--num-cpus", "2", "--num-gpus", "0", *flags]
    command += [] if folder is None else ["--store-dir", str(folder)]
    environment = {**os.environ, "LATTICE_TOKEN": "secret"}
    process = await asyncio.create_subprocess_exec(*command, env=environment)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            stream, hello = await head.dialled()
            stream.welcome()
            yield Pair(head, process, stream, hello)
    finally:
        if process.returncode is None:
            # The first signal asks it to leave, which this head would have to agree to; the second ends it.
            process.send_signal(signal.SIGINT)
            process.terminate()
        await process.wait()
        await server.stop(None)


def payload_of(value: Any) -> payload_pb2.Payload:
    """Return a value as a payload, a payload as it is."""
    if isinstance(value, payload_pb2.Payload):
        return value
    media_type, parts = encode_value(value)
    data = b"".join(bytes(part) for part in parts)
    if media_type == "application/json":
        return payload_pb2.Payload(media_type=media_type, json=data.decode())
    return payload_pb2.Payload(media_type=media_type, data=data)
