"""`entrypoint`: tasks that call a function by its name on the workers."""

from typing import Any

import pytest
from lattice.v1 import task_pb2

from lattice_client import LatticeClient, PreconditionError, TaskDefinitionError, entrypoint
from lattice_worker.convert import function_frame
from lattice_worker.runner.encoding.values import PayloadError
from lattice_worker.runner.invocation.functions import load


def test_entrypoint_has_its_path_inputs_and_outputs() -> None:
    found = entrypoint("js/word_count", inputs=["text"], outputs=["words", "lines"], cpu=0.5, retries=2)
    assert (found.name, found.inputs, found.required, found.takes_any) == ("word_count", ("text",), {"text"}, False)
    assert (found.outputs, found.return_style) == (("words", "lines"), task_pb2.RETURN_STYLE_MAPPING)
    assert (found.resources.cpu, found.settings.retry.max_attempts) == (0.5, 3)
    function, bundle = found.pack()
    assert (function.entrypoint, function.python.call_style, bundle) == (
        "js/word_count",
        task_pb2.CALL_STYLE_KEYWORDS,
        None,
    )
    plain = entrypoint("statistics:mean")
    assert (plain.name, plain.takes_any, plain.outputs) == ("mean", True, ("result",))
    assert function.digest not in {"", plain.pack()[0].digest}


@pytest.mark.parametrize(("path", "settings"), [("", {}), (7, {}), ("js/x", {"cpus": 1}), ("js/x", {"retries": -1})])
def test_entrypoint_raises_when_an_argument_is_wrong(path: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(TaskDefinitionError):
        entrypoint(path, **settings)


def test_entrypoint_raises_when_it_is_called_locally() -> None:
    with pytest.raises(TypeError, match="'js/word_count' is an entry point"):
        entrypoint("js/word_count")(text="a")


def test_python_worker_runs_an_importable_entry_point(client: LatticeClient) -> None:
    workflow = client.create_workflow("entry points")
    mean = workflow.add_task(entrypoint("statistics:mean", inputs=["data"]), {"data": [1, 2, 6]})
    workflow.add_task(entrypoint("statistics:mean"), {"data": [mean.output, 5]})
    assert workflow.run().result() == {"result": 4}


def test_run_is_refused_when_no_worker_offers_the_entry_point(client: LatticeClient) -> None:
    workflow = client.create_workflow("entry points")
    workflow.add_task(entrypoint("js/word_count", inputs=["text"]), {"text": "a"})
    with pytest.raises(PreconditionError, match="it has no entry point 'js/word_count'"):
        workflow.run()
    with pytest.raises(TaskDefinitionError, match="needs input 'text'"):
        workflow.add_task(entrypoint("js/word_count", inputs=["text"]))


@pytest.mark.parametrize(
    ("definition", "text"),
    [
        ({"code": "source", "function": "double", "name": "double"}, "the source has no 'double'; it has twice"),
        (
            {"code": "entrypoint", "entrypoint": "missing_module:run", "name": "missing_module:run"},
            "No module named 'missing_module'; install it where the worker runs",
        ),
    ],
)
def test_worker_says_why_named_code_cannot_be_loaded(definition: dict[str, Any], text: str) -> None:
    with pytest.raises(PayloadError) as caught:
        load({"bundle": "", **definition}, b"def twice(x): return 2 * x")
    assert str(caught.value).startswith(f"the function {definition['name']!r} cannot be loaded here: ")
    assert str(caught.value).endswith(text)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (task_pb2.Function(display_name="shown", entrypoint="a:b"), "shown"),
        (task_pb2.Function(entrypoint="a:b"), "a:b"),
        (task_pb2.Function(python=task_pb2.PythonFunction(source=task_pb2.PythonSource(name="double"))), "double"),
    ],
)
def test_function_without_a_name_is_named_by_its_code(function: task_pb2.Function, name: str) -> None:
    assert function_frame(function, "")[0]["name"] == name
