"""Ctrl-C during a call of gRPC: it is raised, and leaves no lock held."""

import functools
import signal
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from lattice_client.transport import interrupts
from lattice_client.transport.interrupts import calling

WAIT_S = 60.0


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    """The handler of a program: a shell starts background jobs with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_while_a_lock_is_taken_comes_after_it_is_released() -> None:
    order: list[str] = []

    def note(what: str, *_: object) -> None:
        order.append(what)

    lock: Any = SimpleNamespace(
        acquire=None,
        release=None,
        # As a signal that arrives in `Condition.__enter__`, whose frame is then the innermost one of Python.
        __enter__=functools.partial(signal.raise_signal, signal.SIGINT),
        __exit__=functools.partial(note, "released"),
    )
    condition = threading.Condition(lock)

    def use() -> None:
        with condition:
            order.append("held")
        time.sleep(WAIT_S)

    with pytest.raises(KeyboardInterrupt):
        calling(use)
    assert order == ["held", "released"]


def test_interrupt_is_raised_at_once_when_no_lock_is_taken() -> None:
    def use() -> None:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it continues")

    with pytest.raises(KeyboardInterrupt):
        calling(use)


def test_the_program_s_own_handler_is_called_and_put_back() -> None:
    seen: list[int] = []

    def own(number: int, frame: object) -> None:
        seen.append(number)

    signal.signal(signal.SIGINT, own)
    try:
        calling(signal.raise_signal, signal.SIGINT)
        assert seen == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_calling_does_not_change_a_signal_without_a_handler(handler: signal.Handlers) -> None:
    signal.signal(signal.SIGINT, handler)
    try:
        assert calling(signal.getsignal, signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_calls_within_calls_and_in_other_threads_change_nothing() -> None:
    assert calling(calling, signal.getsignal, signal.SIGINT) is not signal.default_int_handler
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(calling(signal.getsignal, signal.SIGINT)))
    thread.start()
    thread.join(WAIT_S)
    assert found == [signal.default_int_handler]


def test_an_interrupt_that_a_lock_delays_comes_when_the_call_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "AGAIN_S", 600.0)
    lock: Any = SimpleNamespace(
        acquire=None,
        release=None,
        __enter__=functools.partial(signal.raise_signal, signal.SIGINT),
        __exit__=lambda *_: None,
    )
    condition = threading.Condition(lock)
    returned = []

    def use() -> None:
        with condition:
            pass
        returned.append(None)

    with pytest.raises(KeyboardInterrupt):
        calling(use)
    assert returned
