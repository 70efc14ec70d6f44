"""The definition of a model: its budget, its checks and its ends."""

import pytest
from google.protobuf.duration_pb2 import Duration
from lattice.v1 import llm_pb2, service_pb2

from lattice_server.core.errors import InvalidError
from lattice_server.core.services.budgets import Limits
from lattice_server.core.services.model import HealthCheck
from lattice_server.rpc.convert.llms import llm_from_proto


def provider(budget: service_pb2.LlmBudget | None) -> llm_pb2.LlmSpec:
    engine = llm_pb2.LLM_ENGINE_PROVIDER
    return llm_pb2.LlmSpec(name="gpt", engine=engine, base_url="https://provider/v1", budget=budget)


def test_limits_that_are_not_set_are_none_and_the_window_is_a_minute() -> None:
    assert llm_from_proto(provider(None)).budget is None
    found = llm_from_proto(provider(service_pb2.LlmBudget(requests_per_minute=500)))
    assert found.budget == Limits(500, None, None, 60.0)
    engine = llm_pb2.LlmSpec(name="m", engine=llm_pb2.LLM_ENGINE_OPENAI, command=["x"])
    engine.budget.concurrency = 3
    assert llm_from_proto(engine).budget == Limits(None, None, 3)


@pytest.mark.parametrize(
    ("budget", "field"),
    [
        (service_pb2.LlmBudget(requests_per_minute=0), "requests_per_minute"),
        (service_pb2.LlmBudget(tokens_per_minute=-1), "tokens_per_minute"),
        (service_pb2.LlmBudget(concurrency=0), "concurrency"),
        (service_pb2.LlmBudget(window=Duration(nanos=5)), "window"),
        (service_pb2.LlmBudget(window=Duration(seconds=3601)), "window"),
    ],
)
def test_limits_out_of_range_are_refused(budget: service_pb2.LlmBudget, field: str) -> None:
    with pytest.raises(InvalidError) as caught:
        llm_from_proto(provider(budget))
    assert [one.field for one in caught.value.violations] == [f"spec.budget.{field}"]


def test_engine_has_the_checks_and_ends_of_its_definition_and_a_path_of_its_own() -> None:
    engine = llm_pb2.LlmSpec(name="m", engine=llm_pb2.LLM_ENGINE_OPENAI, command=["x"])
    found = llm_from_proto(engine)
    assert (found.health, found.drain_timeout_s, found.stop_grace_s) == (HealthCheck("/v1/models"), 30.0, 10.0)
    engine.health.MergeFrom(service_pb2.HealthCheck(interval=Duration(seconds=2), failures=5))
    engine.health.timeout.seconds = 3
    engine.drain_timeout.seconds, engine.stop_grace.seconds, engine.health_path = 4, 5, "/ready"
    found = llm_from_proto(engine)
    assert (found.health, found.drain_timeout_s) == (HealthCheck("/ready", 2.0, 3.0, 5), 4.0)
    assert found.stop_grace_s == 5.0
    engine.health.http_path = "/alive"
    assert llm_from_proto(engine).health.http_path == "/alive"
