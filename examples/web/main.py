"""A web service whose requests are runs. A client that leaves takes its run with it.

    pip install fastapi uvicorn
    LATTICE_TARGET=127.0.0.1:50051 python examples/web/main.py [PORT]
    curl 'http://127.0.0.1:8000/count?words=to+be+or+not&seconds=1'
    curl -N 'http://127.0.0.1:8000/stream?words=to+be+or+not&seconds=1'

FastAPI does not stop a handler when its client disconnects, so `/count` watches for that. It does stop the body of a
streamed response. With `cancel_on_disconnect` the runs end with this service too.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from lattice_client import AsyncLatticeClient, task

T = TypeVar("T")


@task(cpu=0.1)
async def count(word: str, seconds: float) -> int:
    """Stand for work that takes a while."""
    await asyncio.sleep(seconds)
    return len(word)


@task(cpu=0.1, combine="".join)
async def spell(words: str, seconds: float) -> AsyncIterator[str]:
    """Stream words slowly, as a language model does."""
    for word in words.split():
        await asyncio.sleep(seconds)
        yield f"{word} "


@asynccontextmanager
async def connected(app: FastAPI) -> AsyncIterator[None]:
    """Hold one client for all requests."""
    async with AsyncLatticeClient() as app.state.client:
        yield


app = FastAPI(lifespan=connected)


@app.get("/count")
async def count_words(request: Request, words: str, seconds: float = 0.0) -> dict[str, Any]:
    """Count the letters of each word, side by side."""
    workflow = request.app.state.client.create_workflow("count")
    for number, word in enumerate(words.split()):
        workflow.add_task(count, {"word": word, "seconds": seconds}, task_id=f"{number}-{word}")
    run = await workflow.run(cancel_on_disconnect=True)
    found = await while_connected(request, run.result())
    return {"run_id": run.run_id, "result": found}


@app.get("/stream")
async def stream_words(request: Request, words: str, seconds: float = 0.0) -> StreamingResponse:
    """Stream the words of a task."""
    workflow = request.app.state.client.create_workflow("stream")
    spelling = workflow.add_task(spell, {"words": words, "seconds": seconds})
    run = await workflow.run(cancel_on_disconnect=True)

    async def body() -> AsyncIterator[str]:
        try:
            async for word in run.stream(spelling):
                yield word
        except asyncio.CancelledError:
            await asyncio.shield(run.cancel("the client left"))
            raise

    return StreamingResponse(body(), media_type="text/plain", headers={"run-id": run.run_id})


async def while_connected(request: Request, work: Awaitable[T]) -> T | None:
    """Wait for work while the client of a request is there; then cancel it and return None."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.create_task(left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]) if len(sys.argv) > 1 else 8000, log_level="warning")
