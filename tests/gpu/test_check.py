"""The checks for a machine with a GPU, as far as a machine without one can make them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.serving import served
from lattice_client import LatticeClient
from tests.gpu import check
from tests.gpu.check import Gpu

DRIVER = Path("/dev/nvidiactl")
MEMORY_MIB = 8192
COUNTED = Gpu(0, MEMORY_MIB, "", "")
FLAGS = ("--executor", "local", "--num-cpus", "4", "--gpu-memory", str(MEMORY_MIB))


def run_check(*arguments: str, devices: str | None = None) -> "subprocess.CompletedProcess[str]":
    environment = os.environ if devices is None else {**os.environ, "CUDA_VISIBLE_DEVICES": devices}
    command = [sys.executable, "-m", "tests.gpu.check", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)


@pytest.fixture(scope="module")
def client() -> Iterator[LatticeClient]:
    """A client of a server that counts a GPU which need not exist."""
    with served(*FLAGS, "--num-gpus", "1") as (address, _), LatticeClient(address) as found:
        yield found


@pytest.mark.slow
def test_check_says_that_there_is_no_gpu_when_none_is_visible() -> None:
    done = run_check(devices="")
    assert (done.returncode, done.stderr) == (check.CANNOT, "")
    assert done.stdout.startswith("no GPU on this machine: ")


def test_check_refuses_an_executor_that_does_not_exist() -> None:
    done = run_check("--executor", "mesos")
    assert done.returncode == 2
    assert "invalid choice: 'mesos'" in done.stderr


@pytest.mark.slow
def test_check_finds_the_gpu_that_a_server_offers(client: LatticeClient) -> None:
    found = check.offered_gpu(client)
    assert found is not None
    assert (found.index, found.memory_mib) == (0, MEMORY_MIB)


@pytest.mark.slow
def test_checks_of_leases_pass_when_devices_are_counted_only(
    client: LatticeClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.run_checks(client, COUNTED, check.CHECKS[:2]) == 0
    assert capsys.readouterr().out.count("passed: ") == 2


@pytest.mark.slow
def test_checks_of_leases_fail_when_the_server_offers_other_devices(capsys: pytest.CaptureFixture[str]) -> None:
    with served(*FLAGS, "--num-gpus", "2") as (address, _), LatticeClient(address) as client:
        assert check.run_checks(client, replace(COUNTED, index=7), check.CHECKS[:2]) == 2
    found = capsys.readouterr().out
    assert "the leases are of the GPUs [[0]], and the server offers 7" in found
    assert "the third task is not said to wait for memory of the GPU" in found


@pytest.mark.slow
def test_killed_process_is_reported_as_a_crash(client: LatticeClient) -> None:
    run, chunk = check.begun(client, check.using(check.hold, gpu=1))
    check.kill(run, chunk["pid"])
    run, chunk = check.begun(client, check.using(check.hold, gpu=1))
    check.cancel(run, chunk["pid"])
    assert client.run_task(check.using(check.hello, gpu=1), {}) == {"result": None}


def test_time_limit_ends_the_process_and_is_lifted_after_the_block() -> None:
    with pytest.raises(SystemExit, match="took longer than 1 s"), check.time_limit(1):
        signal.pause()
    before = signal.getsignal(signal.SIGALRM)
    with check.time_limit(1):
        assert signal.getsignal(signal.SIGALRM) != before
    assert (signal.getsignal(signal.SIGALRM), signal.alarm(0)) == (before, 0)


@pytest.mark.gpu
@pytest.mark.slow
def test_functions_compute_on_the_cpu(client: LatticeClient) -> None:
    pytest.importorskip("torch")
    found = client.run_task(check.using(check.multiply), {"device": "cpu", "size": 64})["result"]
    assert (found["error"], found["uuid"]) == (0, "")
    run, _ = check.begun(client, check.using(check.occupy), {"device": "cpu", "size_bytes": 1000})
    run.signal(check.GO)
    assert run.result(timeout=check.WAIT_S) == {"result": 1000}
    assert client.run_task(check.using(check.look), {})["result"]["visible"] == ""


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_checks_pass_on_this_machine() -> None:
    if not DRIVER.exists():  # Then the first test has the answer of the command.
        pytest.skip("no driver of NVIDIA on this machine")
    done = run_check()
    if done.returncode == check.CANNOT:
        pytest.skip(done.stdout)
    assert done.returncode == check.PASSED, done.stdout
