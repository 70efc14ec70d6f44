"""Output past `sys.stdout` and `sys.stderr`, as the agent reads it."""

import asyncio
import os

from lattice_worker.pool.rawoutput import RawOutput


def test_output_has_its_writer_when_the_invocation_ends_during_the_read() -> None:
    read, write = os.pipe()
    named, taken = [7], []

    def writer() -> int:
        # The process finds its pipe empty right after the read: no invocation is named from then on.
        return named.pop() if named else 0

    async def scenario() -> None:
        output = RawOutput({"stdout": read}, lambda: None, writer, lambda *found: taken.append(found))
        os.write(write, b"a line\n")
        output.read()
        output.close()

    asyncio.run(scenario())
    os.close(write)
    assert taken == [("stdout", "a line\n", 7, 7)]
