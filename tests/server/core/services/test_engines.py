"""The command lines of engines."""

import pytest

from lattice_server.core.model import Resources
from lattice_server.core.services.engines import OPENAI, TRANSFORMERS, VLLM, engine_of


def test_vllm_serves_a_model_by_the_name_of_its_service() -> None:
    found = engine_of(VLLM, "small", "org/model", Resources(gpu=1), arguments=["--max-model-len", "4096"])
    assert found.command == (
        *("vllm", "serve", "org/model", "--served-model-name", "small", "--host", "{host}", "--port", "{port}"),
        *("--disable-access-log-for-endpoints", "/health,/metrics", "--max-model-len", "4096"),
    )
    assert (found.served_model, found.health_path, found.concurrency) == ("small", "/health", None)
    assert found.environment == {"VLLM_NO_USAGE_STATS": "1"}


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        (2, "--tensor-parallel-size 2"),
        (0.5, "--gpu-memory-utilization 0.5"),
        (0.3339, "--gpu-memory-utilization 0.333"),
    ],
)
def test_vllm_is_told_its_share_of_the_devices(gpu: float, expected: str) -> None:
    assert expected in " ".join(engine_of(VLLM, "small", "m", Resources(gpu=gpu)).command)


def test_transformers_answers_one_request_at_a_time_without_a_hub_for_a_folder() -> None:
    found = engine_of(TRANSFORMERS, "small", "/models/tiny", Resources())
    assert found.command[:3] == ("transformers", "serve", "/models/tiny")
    assert found.command[-2:] == ("--device", "cpu")
    assert (found.concurrency, found.served_model) == (1, "/models/tiny")
    assert found.environment == {"HF_HUB_OFFLINE": "1"}
    assert "--device" not in engine_of(TRANSFORMERS, "small", "org/model", Resources(gpu=1)).command


def test_a_command_is_told_the_model_it_serves() -> None:
    found = engine_of(OPENAI, "small", "m", Resources(), ["serve", "{model}", "{port}"], ["--fast"])
    assert found.command == ("serve", "m", "{port}", "--fast")
    assert (found.served_model, found.health_path) == ("m", "/v1/models")
    assert engine_of(OPENAI, "small", "", Resources(), ["serve"]).served_model == "small"


@pytest.mark.parametrize(
    ("kind", "model", "command", "why"),
    [
        (OPENAI, "m", [], "needs the command"),
        (VLLM, "", [], "needs a model"),
        (TRANSFORMERS, "m", ["serve"], "command of its own"),
    ],
)
def test_engine_is_refused_in_words_when_a_part_is_missing(kind: str, model: str, command: list[str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        engine_of(kind, "small", model, Resources(), command)
