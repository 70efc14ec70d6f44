"""Delivery of a stream's messages to threads, one of which reads it for all."""

import queue
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lattice_client.runs.driver import blocking
from lattice_client.transport.blocking_calls import BlockingMailbox, deadline
from lattice_client.transport.blocking_delivery import BlockingDelivery
from lattice_client.transport.channel import LimitReachedError


class Stream:
    """A stream whose messages are numbers of mailboxes; None is its end. An exception is raised by the reader."""

    def __init__(self) -> None:
        self.messages: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self.boxes: dict[int, BlockingMailbox[int | None]] = {}
        self.readers: list[int] = []
        self._is_read = threading.Lock()
        self.delivery = BlockingDelivery(self._step)

    async def _step(self) -> bool:
        assert self._is_read.acquire(blocking=False), "one thread at a time reads"
        try:
            self.readers.append(threading.get_ident())
            message = self.messages.get()
        finally:
            self._is_read.release()
        if message is None or isinstance(message, BaseException):
            for box in list(self.boxes.values()):
                box.put(None)
            self.messages.put(message)
            if message is not None:
                raise message
            return False
        self.boxes.pop(message).put(message)
        return True

    def box(self, number: int) -> BlockingMailbox[int | None]:
        """Make a mailbox; the reader takes it away with its message."""
        return self.boxes.setdefault(number, BlockingMailbox())

    def get(
        self, number: int, limit_s: float | None = None, box: BlockingMailbox[int | None] | None = None
    ) -> int | None:
        """Wait for the message of a mailbox, which was made before if the message may have come."""
        box = box or self.box(number)
        token = deadline.set(None if limit_s is None else time.monotonic() + limit_s)
        try:
            return blocking(self.delivery.get(box))
        finally:
            deadline.reset(token)


@pytest.fixture
def stream() -> Iterator[Stream]:
    """A stream; it ends after the test, and so does the thread that may read it."""
    made = Stream()
    yield made
    made.messages.put(None)


def wait_until(condition: Any) -> None:
    ends_at = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends_at, "it never came true"
        time.sleep(0.001)


def test_a_thread_reads_its_own_message(stream: Stream) -> None:
    for number in range(5):
        box = stream.box(number)
        stream.messages.put(number)
        assert stream.get(number, box=box) == number
    assert stream.readers == [threading.get_ident()] * 5


def test_every_thread_gets_its_own_message(stream: Stream) -> None:
    threads, each, order = 8, 200, random.Random(3)
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()

    def ask(thread: int) -> list[int | None]:
        found = []
        for index in range(each):
            number = thread * each + index
            box = stream.box(number)
            waiting.put(number)
            found.append(stream.get(number, 60 if thread == 7 and index > each // 2 else None, box))
        return found

    def answer() -> None:
        held: list[int] = []
        for _ in range(threads * each):
            held.append(waiting.get(timeout=10))
            # Sometimes several answers come together, in any order.
            if order.random() < 0.6 or len(held) == threads or waiting.empty():
                order.shuffle(held)
                while held:
                    stream.messages.put(held.pop())

    with ThreadPoolExecutor(threads + 1) as pool:
        answering = pool.submit(answer)
        asked = [pool.submit(ask, thread) for thread in range(threads)]
        for thread, found in enumerate(asked):
            assert found.result(timeout=60) == list(range(thread * each, (thread + 1) * each))
        answering.result(timeout=10)


def test_the_reader_that_leaves_appoints_one_that_waits(stream: Stream) -> None:
    with ThreadPoolExecutor(3) as pool:
        waits = [pool.submit(stream.get, 0)]
        wait_until(lambda: stream.readers)
        waits += [pool.submit(stream.get, number) for number in (1, 2)]
        wait_until(lambda: len(stream.delivery._waiting) == 2)
        for number in (0, 1, 2):
            stream.messages.put(number)
            assert waits[number].result(timeout=10) == number


def test_a_thread_with_a_limit_does_not_read_and_does_not_end_the_stream(stream: Stream) -> None:
    with pytest.raises(LimitReachedError):
        stream.get(0, 0.05)
    assert threading.get_ident() not in stream.readers
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(stream.get, 1, box=stream.box(1))
        stream.messages.put(1)
        assert waiting.result(timeout=10) == 1


def test_a_thread_with_a_limit_is_not_appointed(stream: Stream) -> None:
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(stream.get, 0)
        wait_until(lambda: stream.readers)
        # The thread that reads for it starts after it has begun to wait.
        stream.delivery._has_thread = True
        limited = pool.submit(stream.get, 1, 60)
        wait_until(lambda: 1 in stream.boxes)
        time.sleep(0.05)  # Let it begin to wait; the outcome is the same when it has not.
        stream.delivery._has_thread = False
        stream.delivery._start_thread()
        wait_until(lambda: stream.delivery._waiting)
        for number, waiting in enumerate((reading, limited)):
            stream.messages.put(number)
            assert waiting.result(timeout=10) == number


def test_a_reader_that_is_interrupted_leaves_the_others_without_the_stream(stream: Stream) -> None:
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(stream.get, 0)
        wait_until(lambda: stream.readers)
        other = pool.submit(stream.get, 1)
        wait_until(lambda: stream.delivery._waiting)
        stream.messages.put(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            reading.result(timeout=10)
        assert other.result(timeout=10) is None


def test_all_waiting_threads_learn_of_the_end(stream: Stream) -> None:
    with ThreadPoolExecutor(8) as pool:
        waits = [pool.submit(stream.get, number, 60 if number % 2 else None) for number in range(8)]
        wait_until(lambda: len(stream.boxes) == 8)
        stream.messages.put(None)
        assert [one.result(timeout=10) for one in waits] == [None] * 8


def test_a_signal_handler_that_waits_while_its_thread_reads_is_refused() -> None:
    found = []

    class Handled(Stream):
        async def _step(self) -> bool:
            if not found:
                found.append(self.get(7))  # As a signal handler does, which Python calls in the reading thread.
            return await super()._step()

    stream = Handled()
    box = stream.box(0)
    stream.messages.put(0)
    assert stream.get(0, box=box) == 0
    assert found == [None]
    del stream.boxes[7]
    box = stream.box(1)
    stream.messages.put(1)
    assert stream.get(1, box=box) == 1, "the reader left once"
