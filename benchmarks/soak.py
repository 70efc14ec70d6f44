"""`python -m benchmarks.soak`: a server under load of every kind for 15 minutes, and whether anything grows.

The load makes new code, large values, failures, output, coroutines and tasks that add tasks; it cancels, retries and
abandons. The limits of the server's stores are lowered, so that each is reached within two minutes; from then on no
figure may have a trend. See `soak_figures` for the figures.
"""

import argparse
import asyncio
import hashlib
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
from lattice.v1 import artifact_pb2, artifact_pb2_grpc, task_pb2, workflow_pb2, workflow_pb2_grpc

from benchmarks.soak_figures import Sampler, report
from lattice_client import AsyncLatticeClient, LatticeError, RunError, context, task

CLOSURE_BYTES = 1_000_000
VALUE_BYTES = 300_000
AT_ONCE = 6
CALL_S = 60.0
SETTINGS = """
tenant_share = 1.0
code_bytes = 33_554_432
upload_bytes = 67_108_864
upload_ttl_s = 20.0
repeat_ttl_s = 30.0
result_ttl_s = 30.0
retained_runs = 200
retained_bytes = 33_554_432
retained_artifact_bytes = 33_554_432
workflow_bytes = 4_194_304
spare_bytes = 16_777_216
"""


@task
def echo(value: bytes) -> bytes:
    return value


@task
def fail(text: str) -> None:
    raise ValueError(text * 1000)


@task
def talk(lines: int) -> None:
    for number in range(lines):
        print(f"line {number} " + "x" * 80)


@task
async def rest(seconds: float) -> float:
    await asyncio.sleep(seconds)
    return seconds


@task
def wait(seconds: float) -> None:
    time.sleep(seconds)


@task
def numbers(count: int) -> list[int]:
    return list(range(count))


@task
def plan(count: int) -> int:
    for number in range(count):
        context.spawn(rest, {"seconds": number / 1000})
    return count


@task(retries=1, retry_backoff=0)
def second_time_lucky(value: int) -> int:
    if context.current().number < 2:
        raise ConnectionError("not yet")
    return value


@task
def crash() -> None:
    os._exit(3)


class Load:
    """The callers. Each method is one kind of load, and is called in turn."""

    def __init__(self, client: AsyncLatticeClient, channel: grpc.aio.Channel) -> None:
        self._client = client
        self._artifacts = artifact_pb2_grpc.ArtifactServiceStub(channel)  # type: ignore[no-untyped-call]
        self._workflows = workflow_pb2_grpc.WorkflowServiceStub(channel)  # type: ignore[no-untyped-call]
        self._numbers = 0
        self.calls: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    async def go_on(self, seconds: float, rate: float) -> None:
        """Call each kind in turn at an even rate, for a while."""
        kinds: list[Callable[[], Awaitable[None]]] = [
            self.closure, self.coroutine_closure, self.value, self.unread_value, self.abandoned_handle, self.failure,
            self.output, self.coroutines, self.mapped, self.spawned, self.cancelled, self.retried, self.crashed,
            self.abandoned_upload, self.broken_upload, self.stored_workflow, self.bundle, self.reader_that_leaves,
            self.same_id,
        ]  # fmt: skip
        limit, calls = asyncio.Semaphore(AT_ONCE), set()
        started, number = time.monotonic(), 0
        while time.monotonic() - started < seconds:
            await asyncio.sleep(max(0.0, started + number / rate - time.monotonic()))
            await limit.acquire()
            call = asyncio.create_task(self._call(kinds[number % len(kinds)]))
            calls.add(call)
            call.add_done_callback(lambda ended: (limit.release(), calls.discard(ended)))
            number += 1
        await asyncio.gather(*calls)

    async def _call(self, kind: Callable[[], Awaitable[None]]) -> None:
        name = kind.__name__
        self.calls[name] += 1
        try:
            async with asyncio.timeout(CALL_S):
                await kind()
        except (LatticeError, grpc.RpcError, TimeoutError, AssertionError) as error:
            self.errors[f"{name}: {type(error).__name__}: {error}"[:200]] += 1

    async def closure(self) -> None:
        blob = random.randbytes(CLOSURE_BYTES)

        @task
        def measure() -> int:
            return len(blob)

        assert await self._client.run_task(measure, {}) == {"result": CLOSURE_BYTES}

    async def coroutine_closure(self) -> None:
        blob = random.randbytes(CLOSURE_BYTES)

        @task
        async def measure() -> int:
            return len(blob)

        assert await self._client.run_task(measure, {}) == {"result": CLOSURE_BYTES}

    async def value(self) -> None:
        given = random.randbytes(VALUE_BYTES)
        assert await self._client.run_task(echo, {"value": given}) == {"result": given}

    async def unread_value(self) -> None:
        workflow = self._client.create_workflow()
        workflow.add_task(echo, {"value": random.randbytes(VALUE_BYTES)})
        await workflow.run()

    async def abandoned_handle(self) -> None:
        workflow = self._client.create_workflow()
        workflow.add_task(rest, {"seconds": 0.1})
        run = await workflow.run()
        del run

    async def failure(self) -> None:
        try:
            await self._client.run_task(fail, {"text": "no"})
        except RunError:
            return
        raise AssertionError("it did not fail")

    async def output(self) -> None:
        await self._client.run_task(talk, {"lines": 200})

    async def coroutines(self) -> None:
        workflow = self._client.create_workflow()
        for _ in range(20):
            workflow.add_task(rest, {"seconds": 0.05})
        await (await workflow.run()).result()

    async def mapped(self) -> None:
        workflow = self._client.create_workflow()
        workflow.map(echo, workflow.add_task(numbers, {"count": 20}).output)
        await (await workflow.run()).result()

    async def spawned(self) -> None:
        workflow = self._client.create_workflow()
        workflow.add_task(plan, {"count": 10})
        await (await workflow.run()).result()

    async def cancelled(self) -> None:
        workflow = self._client.create_workflow()
        workflow.add_task(wait, {"seconds": 30.0})
        run = await workflow.run()
        await asyncio.sleep(random.uniform(0, 0.3))
        await run.cancel()
        try:
            await run.result()
        except RunError:
            return
        raise AssertionError("it was not cancelled")

    async def retried(self) -> None:
        assert await self._client.run_task(second_time_lucky, {"value": 3}) == {"result": 3}
        workflow = self._client.create_workflow(failure_policy="finish_independent")
        workflow.add_task(echo, {"value": random.randbytes(VALUE_BYTES)})
        workflow.add_task(fail, {"text": "x"})
        run = await workflow.run()
        for again in (run, None):
            try:
                await (again or await run.retry()).result()
            except RunError:
                continue

    async def crashed(self) -> None:
        try:
            await self._client.run_task(crash, {})
        except RunError:
            return
        raise AssertionError("it did not crash")

    async def abandoned_upload(self) -> None:
        await self._artifacts.WriteArtifact(_parts(random.randbytes(VALUE_BYTES)))

    async def broken_upload(self) -> None:
        call = self._artifacts.WriteArtifact(_parts(random.randbytes(VALUE_BYTES), pause_s=0.05))
        await asyncio.sleep(0.02)
        call.cancel()

    async def stored_workflow(self) -> None:
        source = f"def f():\n    return {self._next()}\n".encode() + b"#" * 50_000
        function = task_pb2.Function(
            python=task_pb2.PythonFunction(source=task_pb2.PythonSource(code=source, name="f"))
        )
        spec = workflow_pb2.WorkflowSpec(functions={"f": function})
        spec.tasks.add(task_id="f", function="f", outputs=["result"])
        made = await self._workflows.CreateWorkflow(workflow_pb2.CreateWorkflowRequest(spec=spec))
        name = made.workflow.workflow_id
        await self._workflows.RunWorkflow(workflow_pb2.RunWorkflowRequest(workflow_id=name))
        await self._workflows.DeleteWorkflow(workflow_pb2.DeleteWorkflowRequest(workflow_id=name))

    async def bundle(self) -> None:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("soaked.py", f"VALUE = {self._next()}\n\ndef get():\n    return VALUE\n")
            file.writestr("data.bin", random.randbytes(200_000))
        data = archive.getvalue()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        code = "def f():\n    import soaked\n    return soaked.get()\n"
        function = task_pb2.Function(
            python=task_pb2.PythonFunction(source=task_pb2.PythonSource(code=code, name="f")), bundle_digest=digest
        )
        spec = workflow_pb2.WorkflowSpec(functions={"f": function})
        spec.bundles.add(digest=digest, zip=data)
        spec.tasks.add(task_id="f", function="f", outputs=["result"])
        run = workflow_pb2.RunWorkflowRequest(workflow=spec)
        async for answer in self._workflows.ExecuteWorkflow(workflow_pb2.ExecuteWorkflowRequest(run=run)):
            if answer.HasField("ended"):
                outputs = answer.ended.final_tasks[0].outputs
                assert outputs["result"].json, answer

    async def reader_that_leaves(self) -> None:
        workflow = self._client.create_workflow()
        workflow.add_task(rest, {"seconds": 0.3})
        run = await workflow.run()
        async for _ in run.events():
            break

    async def same_id(self) -> None:
        run_id = f"soak-{self._next()}"
        for _ in range(3):
            workflow = self._client.create_workflow()
            workflow.add_task(rest, {"seconds": 0.01}, "rest")
            await (await workflow.run(run_id=run_id)).result()

    def _next(self) -> int:
        self._numbers += 1
        return self._numbers


async def _parts(data: bytes, pause_s: float = 0.0) -> AsyncIterator[artifact_pb2.WriteArtifactRequest]:
    for start in range(0, len(data), 100_000):
        yield artifact_pb2.WriteArtifactRequest(data=data[start : start + 100_000])
        await asyncio.sleep(pause_s)


async def soak(address: str, pid: int, store: Path, flags: argparse.Namespace) -> bool:
    """Put load on a server and watch it; return whether nothing grew."""
    async with AsyncLatticeClient(address) as client, grpc.aio.insecure_channel(address) as channel:
        load = Load(client, channel)
        sampler = Sampler(pid, store, channel)
        sampling = asyncio.create_task(sampler.go_on(flags.every))
        await load.go_on(flags.seconds, flags.rate)
        sampling.cancel()
        print(f"{sum(load.calls.values())} calls: {dict(load.calls)}")
        for error, times in load.errors.most_common():
            print(f"error, {times} times: {error}")
        is_flat = report(sampler.samples, flags.settle, flags.output)
        return is_flat and not load.errors


def main() -> None:
    """Start a server, soak it, and report."""
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=900.0)
    parser.add_argument("--settle", type=float, default=120.0, help="seconds after which nothing may grow")
    parser.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds between samples")
    parser.add_argument("--rate", type=float, default=12.0, help="calls a second")
    parser.add_argument("--cpus", type=int, default=4)
    parser.add_argument("--output", type=Path, help="where the samples go, as JSON")
    flags = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="lattice-soak-", dir="/dev/shm") as store,
        tempfile.NamedTemporaryFile("w", suffix=".toml") as file,
    ):
        file.write(f'store_folder = "{store}"\n{SETTINGS}')
        file.flush()
        lattice = str(Path(sys.executable).parent / "lattice")
        command = [lattice, "start", "--head", "--port", "0", "--executor", "local", "--num-cpus", str(flags.cpus)]
        server = subprocess.Popen([*command, "--config", file.name], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip().rpartition(" ")[2]
            is_flat = asyncio.run(soak(address, server.pid, Path(store), flags))
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
        left = list(Path(store).iterdir())
        if left:
            print(f"the server left {left}")
        sys.exit(0 if is_flat and not left else 1)


if __name__ == "__main__":
    main()
