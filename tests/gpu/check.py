"""Checks the placement and the memory of tasks on a real GPU: `python -m tests.gpu.check`, for at most five minutes.

It starts servers of its own that offer one GPU of this machine, with the local executor, and with Ray where Ray is
installed. It needs the driver of NVIDIA and a torch that was built for CUDA, in the environment of this Python. Nothing
else may use the GPU meanwhile. It prints a line for each check. The exit status is 0 when all of them passed, 1 when
one failed, and 77 when this machine cannot make them.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from lattice.v1 import resources_pb2, task_pb2

from benchmarks.serving import served
from lattice_client import LatticeClient, PreconditionError, Run, TaskFailedError, context, task

PASSED, FAILED, CANNOT = 0, 1, 77
LIMIT_S = 300
# The start of Ray, or the import of torch by a process, on a slow machine.
WAIT_S = 60.0
FREED_S = 20.0
MIB = 1 << 20
HELD_BYTES = 1 << 30
EXECUTORS = ("local", "ray")
GO = "go"


class CheckError(Exception):
    """A check failed; the message says what was found."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """The GPU that the servers of this script offer."""

    index: int
    memory_mib: int
    uuid: str
    model: str


def seen() -> dict[str, Any]:
    """Return the GPUs that the process of a task sees, and its id."""
    return {"visible": os.environ["CUDA_VISIBLE_DEVICES"], "pid": os.getpid()}


@task
def hello() -> None:
    """Do nothing, on any node."""


@task
def look() -> dict[str, Any]:
    """Return what this process knows about its GPUs, and how many torch finds."""
    import torch

    return {**seen(), "count": torch.cuda.device_count()}


@task
def hold() -> dict[str, Any]:
    """Tell that this task runs, and keep its resources until the run gets the signal."""
    context.emit(seen())
    context.wait_for(GO)
    return seen()


@task
def multiply(device: str, size: int) -> dict[str, Any]:
    """Multiply matrices of whole numbers on a device of torch; return how wrong the product is, and the device."""
    import torch

    left = torch.arange(size * size, dtype=torch.float64).reshape(size, size) % 7
    right = left.T.contiguous() % 5
    found = (left.to(device) @ right.to(device)).cpu()
    uuid = str(torch.cuda.get_device_properties(0).uuid) if device == "cuda" else ""
    return {**seen(), "error": float((found - left @ right).abs().max()), "uuid": uuid}


@task
def occupy(device: str, size_bytes: int) -> int:
    """Fill memory of a device, tell so, and keep it until the run gets the signal; return the sum of the bytes."""
    import torch

    held = torch.ones(size_bytes, dtype=torch.uint8, device=device)
    total = int(held.sum(dtype=torch.int64))
    context.emit(seen())
    context.wait_for(GO)
    return total


def using(function: Any, **settings: Any) -> Any:
    """Return a task with other settings, and without the modules of the tests."""
    return function.with_(exclude=["tests", "benchmarks"], **settings)


def begun(client: LatticeClient, function: Any, inputs: dict[str, Any] | None = None) -> tuple[Run, dict[str, Any]]:
    """Start a run of one task that emits when it runs, and wait until it does; return the run and the chunk."""
    workflow = client.create_workflow()
    one = workflow.add_task(function, inputs or {})
    run = workflow.run()
    return run, next(run.chunks(one, timeout=WAIT_S)).value


def expect(is_so: bool, text: str) -> None:
    """Raise CheckError with a text unless something is so."""
    if not is_so:
        raise CheckError(text)


def check_two_halves_share_the_device(client: LatticeClient, gpu: Gpu) -> str:
    """Two tasks with half a GPU run at once, and both see the GPU that was leased."""
    half = using(hold, gpu=0.5)
    (first, one), (second, other) = begun(client, half), begun(client, half)
    expect(one["pid"] != other["pid"], f"both ran in process {one['pid']}")
    for run, chunk in ((first, one), (second, other)):
        run.signal(GO)
        run.result(timeout=WAIT_S)
        leased = [[*event.data["gpu_indices"]] for event in run.events() if event.type == "task_started"]
        visible = chunk["visible"]
        expect(leased == [[gpu.index]], f"the leases are of the GPUs {leased}, and the server offers {gpu.index}")
        expect(visible == str(gpu.index), f"CUDA_VISIBLE_DEVICES is {visible!r}, and the lease is of {gpu.index}")
    return f"processes {one['pid']} and {other['pid']} saw CUDA_VISIBLE_DEVICES={visible}"


def check_memory_of_the_device_is_reserved(client: LatticeClient, gpu: Gpu) -> str:
    """Two tasks reserve most of the memory; a third waits for it, and runs when one of them has ended."""
    part_mib = gpu.memory_mib * 2 // 5
    part = using(hold, gpu=0.1, gpu_mem=part_mib)
    (first, _), (second, _) = begun(client, part), begun(client, part)
    workflow = client.create_workflow()
    waiting = workflow.add_task(part)
    third = workflow.run()
    third.signal(GO)
    reasons = {reason.resource: reason for reason in third.explain(waiting).reasons}
    kind = resources_pb2.RESOURCE_KIND_GPU_MEMORY
    shown = "; ".join(reason.message for reason in reasons.values())
    expect(kind in reasons, f"the third task is not said to wait for memory of the GPU, but: {shown}")
    expect(reasons[kind].kind == task_pb2.WAIT_KIND_RESOURCES, f"the third task does not wait for resources: {shown}")
    first.signal(GO)
    third.result(timeout=WAIT_S)
    second.signal(GO)
    for run in (first, second):
        run.result(timeout=WAIT_S)
    try:
        client.run_task(using(hold, gpu_mem=gpu.memory_mib + 1), {})
    except PreconditionError as error:
        expect("gpu memory" in str(error), f"the refusal does not name the memory of the GPU: {error}")
    else:
        raise CheckError(f"a task with {gpu.memory_mib + 1} MiB was accepted, and the GPU has {gpu.memory_mib} MiB")
    return f"two tasks with {part_mib} MiB each ran, the third had to wait, and one with more than all was refused"


def check_a_task_without_a_gpu_sees_none(client: LatticeClient, gpu: Gpu) -> str:
    """A task that asks for no GPU finds none."""
    found = client.run_task(using(look), {})["result"]
    expect((found["visible"], found["count"]) == ("", 0), f"it found {found['count']} GPUs, {found['visible']!r}")
    return "torch found none"


def check_torch_computes_on_the_leased_device(client: LatticeClient, gpu: Gpu) -> str:
    """The product of two matrices is right, and the device of torch is the leased one."""
    found = client.run_task(using(multiply, gpu=1), {"device": "cuda", "size": 2048})["result"]
    expect(found["error"] == 0, f"the product is wrong by {found['error']}")
    expect(gpu.uuid.endswith(found["uuid"]), f"torch used {found['uuid']}, and {gpu.uuid} was leased")
    return f"{gpu.model}, {gpu.uuid}"


def kill(run: Run, pid: int) -> None:
    """Kill the process of a task, as the kernel does when memory is short."""
    os.kill(pid, signal.SIGKILL)
    try:
        run.result(timeout=WAIT_S)
    except TaskFailedError as error:
        expect(error.kind == "CRASHED", f"the task failed as {error.kind}, not as a crash")
    else:
        raise CheckError("the task succeeded, although its process was killed")


def cancel(run: Run, pid: int) -> None:
    """Cancel a run, whose process the agent then kills."""
    run.cancel("the memory of its GPU is wanted")


def check_an_ended_process_frees_its_memory(client: LatticeClient, gpu: Gpu) -> str:
    """The memory of a killed process and of a cancelled task is free again, and so is the lease."""
    for end in (kill, cancel):
        before = used_bytes(gpu.index)
        run, chunk = begun(client, using(occupy, gpu=1, retries=0), {"device": "cuda", "size_bytes": HELD_BYTES})
        held = used_bytes(gpu.index) - before
        expect(
            held >= HELD_BYTES * 9 // 10, f"a task holds {HELD_BYTES // MIB} MiB, and {held // MIB} MiB more are used"
        )
        end(run, chunk["pid"])
        deadline = time.monotonic() + FREED_S
        # The driver has no event for freed memory.
        while (left := used_bytes(gpu.index) - before) > HELD_BYTES // 4:
            late = f"{left // MIB} MiB are still used {FREED_S:.0f} s after `{end.__name__}`"
            expect(time.monotonic() < deadline, late)
            time.sleep(0.1)
        found = client.run_task(using(multiply, gpu=1), {"device": "cuda", "size": 64}, timeout=WAIT_S)["result"]
        expect(found["error"] == 0, "the next task computed wrongly")
    return f"{HELD_BYTES // MIB} MiB were free again after a kill and after a cancellation"


# The checks that need torch come last.
CHECKS: tuple[Callable[[LatticeClient, Gpu], str], ...] = (
    check_two_halves_share_the_device,
    check_memory_of_the_device_is_reserved,
    check_a_task_without_a_gpu_sees_none,
    check_torch_computes_on_the_leased_device,
    check_an_ended_process_frees_its_memory,
)


def used_bytes(index: int) -> int:
    """Return how much memory of a GPU all processes use."""
    import pynvml

    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index)).used)


def offered_gpu(client: LatticeClient) -> Gpu | None:
    """Return the last GPU that the nodes of a server offer: its index differs from 0 where there are several."""
    client.run_task(using(hello), {})  # There is a node now.
    offered = [gpu for node in client.nodes() for gpu in node.capacity.gpus]
    if not offered:
        return None
    last = offered[-1]
    return Gpu(last.index, last.memory_bytes // MIB, last.uuid, last.model)


def run_checks(client: LatticeClient, gpu: Gpu, checks: Sequence[Callable[[LatticeClient, Gpu], str]]) -> int:
    """Make checks, print a line for each, and return how many failed."""
    failed = 0
    for check in checks:
        name, started = check.__name__.removeprefix("check_").replace("_", " "), time.monotonic()
        try:
            line = f"passed: {name}: {check(client, gpu)}"
        except Exception as error:
            failed += 1
            line = f"FAILED: {name}: {error}"
        print(f"{line} ({time.monotonic() - started:.1f} s)", flush=True)
    return failed


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """End this process by TimeoutError, and so its servers, when the block takes longer."""

    def give_up(*_: object) -> None:
        raise SystemExit(f"FAILED: the checks took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the checks; return the exit status."""
    parser = argparse.ArgumentParser(prog="tests.gpu.check", description="Checks tasks on a GPU of this machine.")
    parser.add_argument(
        "--executor", choices=EXECUTORS, nargs="+", help="by default local, and ray where Ray is installed"
    )
    executors = parser.parse_args(arguments).executor
    if executors is None:
        executors = [name for name in EXECUTORS if name == "local" or find_spec(name) is not None]
    with time_limit(LIMIT_S):
        with served("--executor", "local") as (address, _), LatticeClient(address) as client:
            gpu = offered_gpu(client)
        if gpu is None:
            print("no GPU on this machine: a worker here offers none, so nothing was checked")
            return CANNOT
        if find_spec("torch") is None:
            print(f"no torch in {sys.prefix}: pip install torch, so nothing was checked on the {gpu.model}")
            return CANNOT
        failed = 0
        for executor in executors:
            print(f"executor {executor}, GPU {gpu.index}: {gpu.model}, {gpu.memory_mib} MiB", flush=True)
            visible = {"CUDA_VISIBLE_DEVICES": str(gpu.index)}
            with served("--executor", executor, env=visible) as (address, _), LatticeClient(address) as client:
                failed += run_checks(client, gpu, CHECKS)
    print("all checks passed" if not failed else f"{failed} checks failed")
    return FAILED if failed else PASSED


if __name__ == "__main__":
    sys.exit(main())
