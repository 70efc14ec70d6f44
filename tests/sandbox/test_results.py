"""Checks of the answers of a sandboxed process by the agent."""

from pathlib import Path
from typing import Any

import pytest

from lattice_worker.runner.frames import ProtocolError
from lattice_worker.sandbox.results import InputError, inlined, require_values, screened

JSON = "application/json"
HEAD = {"kind": "result", "id": "i", "duration": 0.0, "has_raw": False, "made": ["forged"]}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "spares").mkdir()
    (tmp_path / "own").mkdir()
    return tmp_path


def screen(answer: dict[str, Any], blobs: list[bytes], store: Path) -> tuple[dict[str, Any], list[bytes]]:
    return screened(HEAD | answer, blobs, str(store), str(store / "own"), 10)


def test_large_values_are_written_by_the_agent(store: Path) -> None:
    outputs = {"small": {"type": JSON, "blob": 0}, "large": {"type": JSON, "blob": 1}}
    answer, blobs = screen(
        {"outputs": outputs, "split": {"large": [{"type": JSON, "blob": 1}]}}, [b"1", b"2" * 20], store
    )
    (artifact, item) = answer["made"]
    assert blobs == [b"1"]
    assert answer["outputs"] == {
        "small": {"type": JSON, "blob": 0},
        "large": {"type": JSON, "artifact": artifact, "size": 20},
    }
    assert answer["split"]["large"][0]["artifact"] == item
    assert (store / "own" / artifact).read_bytes() == b"2" * 20


@pytest.mark.parametrize(
    "reference", [{"type": JSON, "artifact": "of-another-run", "size": 1}, {"type": JSON, "path": "/"}]
)
def test_answer_is_refused_when_it_names_a_file(reference: dict[str, Any], store: Path) -> None:
    with pytest.raises(ProtocolError):
        screen({"outputs": {"out": reference}, "split": {}}, [], store)
    with pytest.raises(ProtocolError):
        screen({"items": [{"outputs": {}, "split": {"out": [reference]}}]}, [], store)
    with pytest.raises(ProtocolError):
        require_values([{"items": [{"entries": {"a": reference}}]}])


@pytest.mark.parametrize(
    "reference",
    [
        {"type": JSON, "blob": 0, "produced_at": 1},
        {"type": "APPLICATION/vnd.lattice.cloudpickle", "blob": 0},
        {"type": "application/vnd.lattice.cloudpickle; charset=utf-8", "blob": 0},
        {"type": "application/vnd.lattice.pickle-with-outputs", "blob": 0},
        {"type": "", "blob": 0},
        {"type": None, "blob": 0},
        {"type": JSON},
        {"items": [], "type": JSON, "blob": 0},
        {"items": [{"type": JSON, "blob": 0}], "type": "x", "blob": 0},
        [],
    ],
)
def test_answer_is_refused_when_a_value_says_more_than_its_encoding(reference: Any, store: Path) -> None:
    with pytest.raises(ProtocolError, match=r"as a value|something else than values"):
        screen({"outputs": {"out": reference}, "split": {}}, [b"1"], store)
    with pytest.raises(ProtocolError):
        screen({"outputs": {}, "split": {"out": [reference]}}, [b"1"], store)
    with pytest.raises(ProtocolError):
        require_values([{"entries": {"a": {"items": [{"type": JSON, "blob": 0}, reference]}}}])


def test_values_of_spawned_tasks_may_be_wired_and_pickled_around_outputs() -> None:
    output = {"task": "t", "output": "o", "select": [1]}
    pickled = {"type": "application/vnd.lattice.pickle-with-outputs", "blob": 0}
    require_values([{"items": [pickled, output]}, {"entries": {"a": output}}, {"items": []}])
    with pytest.raises(ProtocolError):
        require_values([{"items": [output, pickled]}])


@pytest.mark.parametrize("kind", ["cancelled", "worker_lost", "sandbox_setup", "internal"])
def test_answer_is_refused_when_it_fails_in_the_name_of_lattice(kind: str, store: Path) -> None:
    with pytest.raises(ProtocolError, match=kind):
        screen({"failure": {"kind": kind, "message": "m"}}, [], store)


def test_exit_status_is_dropped_when_the_sandboxed_process_reports_it(store: Path) -> None:
    failure = {"kind": "user_error", "message": "m", "exit_status": -9, "cause": {}}
    answer, _ = screen({"failure": failure}, [], store)
    assert answer["failure"] == {"kind": "user_error", "message": "m"}


def test_names_of_inputs_are_no_names_of_files() -> None:
    require_values([{"entries": {"path": {"type": JSON, "blob": 0}, "artifact": {"type": JSON, "blob": 0}}}])


def test_pickled_exceptions_are_left_out(store: Path) -> None:
    failure = {"kind": "user_error", "message": "m", "exception": 0}
    answer, blobs = screen({"items": [{"failure": failure}, {"outputs": {}, "split": {}}]}, [b"pickle"], store)
    assert answer["items"][0] == {"failure": {"kind": "user_error", "message": "m"}}
    assert (answer["made"], blobs) == ([], [])


def test_value_that_cannot_be_stored_is_a_failure(store: Path) -> None:
    (store / "own").rmdir()
    answer, _ = screen({"outputs": {"out": {"type": JSON, "blob": 0}}, "split": {}}, [b"2" * 20], store)
    assert (answer["failure"]["kind"], answer["made"], "outputs" in answer) == ("resources", [], False)


def test_inputs_in_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"value")
    blobs = [b"first"]
    file = {"type": JSON, "path": str(tmp_path / "a")}
    tree = {"entries": {"k": {"items": [file]}, "p": {"of": file, "select": [1]}}}
    assert inlined(tree, blobs) == {
        "entries": {
            "k": {"items": [{"type": JSON, "blob": 1}]},
            "p": {"of": {"type": JSON, "blob": 2}, "select": [1]},
        }
    }
    assert blobs == [b"first", b"value", b"value"]
    with pytest.raises(InputError, match="no longer in the store"):
        inlined({"type": JSON, "path": str(tmp_path / "gone")}, [])
