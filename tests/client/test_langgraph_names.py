"""LangGraph's private names that the client uses, and the page that lists the compared graphs.

A new version of LangGraph that adds a name fails here, because nodes may use the value of that name.
"""

from dataclasses import fields

from langgraph._internal import _constants
from langgraph._internal._scratchpad import PregelScratchpad
from langgraph.runtime import ExecutionInfo, Runtime

from lattice_client.langgraph.references import CARRIED
from tests.e2e.graphs.table import PAGE, page_with_table

# They describe the call, or belong to the loop in the graph's process.
NOT_CARRIED = {
    "__pregel_node_finished",
    "__pregel_timed_attempt_observer",
    "__pregel_runner_submit",
}


def test_every_private_key_of_a_config_is_known() -> None:
    keys = {value for name, value in vars(_constants).items() if name.startswith("CONFIG_KEY_")}
    assert {key for key in keys if key.startswith("__pregel_")} == CARRIED | NOT_CARRIED


def test_fields_of_runtime_execution_info_and_scratchpad_are_known() -> None:
    assert {found.name for found in fields(Runtime)} == {
        "context",
        "store",
        "stream_writer",
        "heartbeat",
        "previous",
        "execution_info",
        "server_info",
        "control",
    }
    assert {found.name for found in fields(ExecutionInfo)} == {
        "checkpoint_id",
        "checkpoint_ns",
        "task_id",
        "thread_id",
        "run_id",
        "node_attempt",
        "node_first_attempt_time",
    }
    assert {found.name for found in fields(PregelScratchpad)} == {
        "step",
        "stop",
        "call_counter",
        "interrupt_counter",
        "get_null_resume",
        "resume",
        "subgraph_counter",
    }


def test_the_page_has_the_table_of_the_compared_graphs() -> None:
    text = PAGE.read_text()
    assert text == page_with_table(text), "run `python -m tests.e2e.graphs.table`"
