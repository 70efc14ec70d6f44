"""The figures of the cost of telemetry: the interval around a median, and the processor time of other processes."""

import os
import statistics
import subprocess
import sys
import time

import pytest

from benchmarks.telemetry_cost import cpu_ns, layer_us, median_with_interval


@pytest.mark.parametrize(("count", "low", "high"), [(10, 1, 10), (100, 40, 61), (500, 228, 273)])
def test_interval_of_a_median_has_the_ranks_of_the_binomial_distribution(count: int, low: int, high: int) -> None:
    values = list(range(count, 0, -1))
    assert median_with_interval(values) == (statistics.median(values), low, high)


def test_processor_time_of_this_process_is_that_of_its_own_clock() -> None:
    before, found, after = time.process_time_ns(), cpu_ns(os.getpid()), time.process_time_ns()
    assert before <= found <= after


def test_processor_time_of_another_process_has_that_of_its_ended_threads() -> None:
    program = """
import threading, time
def work():
    while time.thread_time() < 0.2:
        pass
thread = threading.Thread(target=work); thread.start(); thread.join()
print(flush=True); input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], text=True, **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert cpu_ns(process.pid) >= 200_000_000
        process.communicate("\n")
    with pytest.raises(OSError, match="Invalid argument"):
        cpu_ns(process.pid)


def test_layer_of_a_stream_is_measured() -> None:
    assert layer_us() < 1000
