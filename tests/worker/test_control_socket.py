"""The agent's end of the control socket."""

import asyncio
import socket
from typing import Any

from lattice_worker.control_socket import Control
from lattice_worker.runner.frames import PACKET_BYTES, ProtocolError, packets_of


def received(packets: list[bytes], unread: list[bytes]) -> tuple[list[dict[str, Any]], list[ProtocolError], int]:
    """Return the frames, the errors and the ends that the agent sees of a process that ended with packets unread."""
    frames: list[dict[str, Any]] = []
    errors: list[ProtocolError] = []
    ends: list[None] = []

    async def scenario() -> tuple[list[dict[str, Any]], list[ProtocolError], int]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control = Control(ours, lambda header, _: frames.append(header), errors.append, lambda: ends.append(None))
        for packet in unread:
            ours.send(packet)
        for packet in packets:
            theirs.send(packet)
        theirs.close()
        control.drain()
        return list(frames), list(errors), len(ends)  # As it is now: the loop reads on while it ends.

    return asyncio.run(scenario())


def test_control_takes_the_last_answer_when_the_process_left_packets_unread() -> None:
    answer = packets_of({"kind": "result", "id": "a"}, [b"value"])
    frames, errors, ends = received(answer, unread=packets_of({"kind": "invoke"}, []))
    assert ([frame["id"] for frame in frames], errors, ends) == (["a"], [], 1)


def test_control_joins_the_packets_of_a_large_frame() -> None:
    frames, errors, ends = received(packets_of({"kind": "log"}, [b"x" * (PACKET_BYTES + 7)]), unread=[])
    assert ([frame["kind"] for frame in frames], errors, ends) == (["log"], [], 1)


def test_control_reports_bytes_that_are_no_frame_and_takes_the_frame_after_them() -> None:
    frames, errors, ends = received([b"\xff garbage", *packets_of({"kind": "log"}, [])], unread=[])
    assert ([frame["kind"] for frame in frames], len(errors), ends) == (["log"], 1, 1)
