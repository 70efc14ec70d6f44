"""A program whose calls OpenTelemetry traces: `python -m tests.server.telemetry.instrumented ADDRESS`."""

import asyncio
import sys
from contextlib import suppress

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.grpc import GrpcAioInstrumentorClient, GrpcInstrumentorClient
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from lattice_client import AsyncLatticeClient, LatticeClient, NotFoundError
from tests.server.telemetry.workload import count


def block(address: str) -> None:
    """Run, follow and describe, and keep a run open, with the blocking client."""
    with LatticeClient(address) as client:
        workflow = client.create_workflow("blocking")
        counted = workflow.add_task(count, {"n": 3})
        run = workflow.run()
        assert list(run.stream(counted)) == [0, 1, 2]
        assert run.result(timeout=60) == {"result": [0, 1, 2]}
        assert [event.type for event in run.events()][-1] == "run_finished"
        with client.open_run("open") as opened:
            opened.add(count, {"n": 1})
        with suppress(NotFoundError):
            client.describe_run("none")


async def suspend(address: str) -> None:
    """The same with the client for event loops."""
    async with AsyncLatticeClient(address) as client:
        workflow = client.create_workflow("suspending")
        counted = workflow.add_task(count, {"n": 3})
        run = await client.run(workflow)
        assert [chunk async for chunk in run.stream(counted)] == [0, 1, 2]
        assert await run.result() == {"result": [0, 1, 2]}
        assert [event.type async for event in run.events()][-1] == "run_finished"
        async with client.open_run("open") as opened:
            await opened.add(count, {"n": 1})


def main() -> None:
    """Do both in a span each."""
    GrpcInstrumentorClient().instrument()  # type: ignore[no-untyped-call]
    GrpcAioInstrumentorClient().instrument()  # type: ignore[no-untyped-call]
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    tracer = trace.get_tracer("program")
    with tracer.start_as_current_span("blocks"):
        block(sys.argv[1])
    with tracer.start_as_current_span("suspends"):
        asyncio.run(suspend(sys.argv[1]))
    provider.shutdown()


if __name__ == "__main__":
    main()
