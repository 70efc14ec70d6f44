"""The task of an instance: starts the program, reports when it is ready and how it is, and stops it when asked to.

It asks the server three questions. The answer to `program` says what to start, the answer to `control` arrives when the
instance has to stop, and each `report` is answered at once, so that reports are sent no faster than they are taken.
Rule: the attempt ends after the last process of the program.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Coroutine
from typing import Any

from lattice_worker import background, context, secrecy
from lattice_worker.services import health, program
from lattice_worker.services.output import Output

# An instance that starts is checked so often at first, and then less often.
QUICK_S, QUICK_FOR_S, SLOW_S = 0.25, 5.0, 1.0
# Linux does not report new connections: they are counted at this interval.
LOAD_S = 1.0
# Lines that come together are reported together.
COALESCE_S = 0.05
# The readiness of a program that just listens; an engine answers later than it listens.
START_CHECK_S = 2.0


def serve() -> dict[str, Any]:
    """Run one instance to its end; the server calls it by its name."""
    found = context.ask("lattice/instance.program")
    if found["secrets"]:
        secrecy.keep_secrets()
    return asyncio.run(Instance(found).run())


class Instance:
    """One instance, from the start of its program to the end of its last process."""

    def __init__(self, found: dict[str, Any]) -> None:
        self._program = found
        environment = found["environment"]
        self._output = Output(environment[name] for name in found["secrets"])
        self._host = found["node_ip"] if found["reach"] == "cluster" else program.LOOPBACK
        self._port = 0
        self._in_flight = 0
        self._grace_s: float | None = None
        self._stopping = asyncio.Event()
        self._failure: BaseException | None = None

    async def run(self) -> dict[str, Any]:
        """Run the program; return how it ended."""
        try:
            self._port = program.free_port(self._host)
            arguments = program.arguments_of(self._program, self._host, self._port)
            environment = program.environment_of(self._program, self._host, self._port, os.environ)
            process = await program.Process.start(self._program, arguments, environment)
        except OSError as error:
            text = f"{error.strerror or error}: {error.filename or self._host}"
            await self._report(state="ended", exit_status=127, message=f"the program cannot be started: {text}")
            return {"exit_status": 127}
        reading = background.start(self._output.read(process.output), self._fail)
        parts = (self._send_lines(), self._wait_for_stop(), self._watch(process.pid), self._count())
        others = [background.start(self._until_unknown(part), self._fail) for part in parts]
        await self._until_over(process)
        status = await process.end(self._grace_s or 0.0)
        for task in others:
            task.cancel()
        await asyncio.wait(others)
        await asyncio.wait([reading], timeout=COALESCE_S * 20)
        reading.cancel()
        return await self._end(status)

    async def _until_over(self, process: program.Process) -> None:
        """Wait until the program ends, is to be stopped, or can no longer be supervised."""
        stopping = background.share(self._stopping.wait())
        ends: list[asyncio.Future[Any]] = [process.ended, stopping]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()

    async def _until_unknown(self, part: Coroutine[Any, Any, None]) -> None:
        """Run a part, until a server that was started anew does not know this instance."""
        try:
            await part
        except context.QuestionError:
            self._stopping.set()

    def _fail(self, error: BaseException) -> None:
        """End the program, of which a part can no longer be seen."""
        self._failure = self._failure or error
        self._stopping.set()

    async def _end(self, status: int) -> dict[str, Any]:
        """Report the last lines, and the end if the program was not asked for it.

        Raises RuntimeError when the program was ended because a part of this failed.
        """
        with contextlib.suppress(context.QuestionError):
            while self._output.news.is_set():
                await self._report()
            if not self._stopping.is_set():
                await self._report(state="ended", exit_status=max(0, status), signal=max(0, -status))
        if self._failure is not None:
            raise RuntimeError(f"the program could not be supervised: {self._failure!r}") from self._failure
        return {"exit_status": status}

    async def _report(self, **report: Any) -> None:
        """Report the lines of the program until now, and then a change of its state."""
        await context.ask_async("lattice/instance.report", report | {"lines": self._output.take()})

    async def _wait_for_stop(self) -> None:
        answer = await context.ask_async("lattice/instance.control")
        self._grace_s = float(answer["grace_s"])
        self._stopping.set()

    async def _send_lines(self) -> None:
        while True:
            await self._output.news.wait()
            await asyncio.sleep(COALESCE_S)
            if self._output.news.is_set():
                await self._report()

    async def _watch(self, pid: int) -> None:
        """Report when the program is ready, and when its checks fail."""
        checked = self._program["health"]
        await self._become_ready(pid)
        endpoint = f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"
        await self._report(state="ready", endpoint=endpoint)
        failures = 0
        while True:
            await asyncio.sleep(checked["interval_s"])  # How often a program is checked is the user's choice.
            try:
                await health.check(self._host, self._port, checked["http_path"], checked["timeout_s"])
            except health.CheckError as error:
                failures += 1
                await self._report(state="unhealthy", failures=failures, detail=str(error))
                continue
            if failures:
                failures = 0
                await self._report(state="ready", endpoint=endpoint)

    async def _become_ready(self, pid: int) -> None:
        started = time.monotonic()
        path, told = self._program["health"]["http_path"], ""
        while True:
            try:
                await health.check(self._host, self._port, path, START_CHECK_S)
                await asyncio.to_thread(health.check_owner, pid, self._port)
                return
            except health.CheckError as error:
                if str(error) != told:
                    told = str(error)
                    await self._report(state="starting", detail=told)
                    if "another program" in told:
                        self._output.add(f"[not ready: {told}]")
            is_young = time.monotonic() - started < QUICK_FOR_S
            await asyncio.sleep(QUICK_S if is_young else SLOW_S)

    async def _count(self) -> None:
        """Report how many connections the program serves, whenever that changes."""
        while True:
            await asyncio.sleep(LOAD_S)
            count = health.connections_to(self._port)
            if count != self._in_flight:
                self._in_flight = count
                await self._report(in_flight=count)
