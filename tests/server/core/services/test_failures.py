"""The class of a failure by the output of a program."""

import pytest

from lattice_server.core.services.failures import LAST_BYTES, failure_of, last_lines
from lattice_server.core.services.model import PERMANENT, FailureKind

VLLM = [
    "INFO 11-30 10:00:00 [api_server.py:1] vLLM API server version 0.33.0",
    "{}",
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}",
]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (
            "ValueError: Free memory on device cuda:0 (3.2/79.1 GiB) on startup is less than desired GPU memory "
            "utilization (0.92, 72.8 GiB).",
            FailureKind.OUT_OF_GPU_MEMORY,
        ),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", FailureKind.OUT_OF_GPU_MEMORY),
        ("ValueError: No available memory for the cache blocks.", FailureKind.KV_CACHE_TOO_SMALL),
        (
            "ValueError: To serve at least one request with the model's max seq len (131072), 16 GiB is needed",
            FailureKind.KV_CACHE_TOO_SMALL,
        ),
        (
            "ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0.",
            FailureKind.DTYPE_UNSUPPORTED,
        ),
        ("Repo id must be in the form 'repo_name' or 'namespace/repo_name': '/m'", FailureKind.MODEL_NOT_FOUND),
        ("Please pass the argument `trust_remote_code=True` to allow custom code", FailureKind.MODEL_NOT_TRUSTED),
        ("ValueError: Invalid repository ID or local directory specified: '/m'", FailureKind.MODEL_NOT_FOUND),
        ("OSError: x is not a local folder and is not a valid model identifier", FailureKind.MODEL_NOT_FOUND),
        ("ValueError: World size (4) is larger than the number of available GPUs (1)", FailureKind.TOO_FEW_GPUS),
        ("OSError: [Errno 98] Address already in use", FailureKind.PORT_IN_USE),
    ],
)
def test_failure_of_an_engine_is_the_cause_it_wrote_before_its_consequences(line: str, kind: FailureKind) -> None:
    lines = [VLLM[0], line, VLLM[2]]
    found = failure_of(1, 0, lines, is_engine=True)
    assert found.kind is kind
    assert line in found.message
    assert found.last_lines == tuple(lines)


@pytest.mark.parametrize(
    "line", ["    load(trust_remote_code=self.trust_remote_code)", "│ --trust-remote-code  --no-trust-remote-code │"]
)
def test_name_of_an_argument_in_code_or_in_a_usage_is_no_cause(line: str) -> None:
    assert failure_of(1, 0, [line], is_engine=True).kind is FailureKind.EXITED


def test_failure_of_any_other_program_is_not_searched_for_causes_of_engines() -> None:
    assert failure_of(1, 0, ["CUDA out of memory"]).kind is FailureKind.EXITED


@pytest.mark.parametrize(
    ("status", "signal", "kind"),
    [
        (1, 0, FailureKind.EXITED),
        (0, 0, FailureKind.EXITED),
        (2, 0, FailureKind.BAD_ARGUMENTS),
        (126, 0, FailureKind.COMMAND_NOT_FOUND),
        (127, 0, FailureKind.COMMAND_NOT_FOUND),
        (0, 9, FailureKind.SIGNALED),
    ],
)
def test_failure_without_a_known_line_follows_from_status_and_signal(
    status: int, signal: int, kind: FailureKind
) -> None:
    found = failure_of(status, signal, ["one", "two", ""])
    assert found.kind is kind
    assert found.message.endswith("two")
    assert (found.exit_status, found.signal) == (None if signal else status, signal)


def test_last_lines_are_the_newest_within_their_bound() -> None:
    lines = [f"{number:04d} {'x' * 500}" for number in range(100)]
    found = last_lines(lines)
    assert found == tuple(lines[-len(found) :])
    assert sum(len(line) + 1 for line in found) <= LAST_BYTES


def test_failures_that_time_heals_are_not_permanent() -> None:
    healing = {FailureKind.OUT_OF_GPU_MEMORY, FailureKind.PORT_IN_USE, FailureKind.EXITED, FailureKind.LOST}
    assert not healing & PERMANENT
