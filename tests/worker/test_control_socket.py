"""The agent's end of the control socket."""

import asyncio
import socket
from typing import Any

from lattice_worker.pool.control_socket import Control
from lattice_worker.runner.frames import PACKET_BYTES, Assembler, ProtocolError, packets_of, parse


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


def test_frames_of_one_step_travel_together_and_in_order() -> None:
    async def scenario() -> list[bytes]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control = Control(ours, lambda *_: None, lambda _: None, lambda: None)
        theirs.setblocking(False)
        for number in range(3):
            control.send({"number": number}, [b"x"])
        await asyncio.sleep(0)
        control.send({"number": 3}, [b"y" * PACKET_BYTES])
        control.send({"number": 4})
        await asyncio.sleep(0)
        control.close()
        packets = []
        while packet := theirs.recv(PACKET_BYTES):
            packets.append(packet)
        theirs.close()
        return packets

    packets = asyncio.run(scenario())
    assembler = Assembler()
    found = [[parse(frame) for frame in assembler.feed(packet)] for packet in packets]
    assert [[header["number"] for header, _ in frames] for frames in found] == [[0, 1, 2], [], [3], [4]]
    assert found[0][1][1] == [b"x"]


def test_frames_that_the_process_does_not_take_wait_and_then_arrive_in_order() -> None:
    count = 2000

    async def scenario() -> list[int]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control = Control(ours, lambda *_: None, lambda _: None, lambda: None)
        for number in range(count):
            control.send({"number": number}, [bytes(1000)])
            if number % 50 == 0:
                await asyncio.sleep(0)
        theirs.setblocking(False)
        assembler, numbers = Assembler(), list[int]()
        while len(numbers) < count:
            try:
                packet = theirs.recv(PACKET_BYTES)
            except BlockingIOError:
                await asyncio.sleep(0)
                continue
            numbers += [parse(frame)[0]["number"] for frame in assembler.feed(packet)]
        control.close()
        theirs.close()
        return numbers

    assert asyncio.run(scenario()) == list(range(count))
