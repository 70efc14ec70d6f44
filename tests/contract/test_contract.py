"""The contract: documented, and translated completely."""

import importlib
import re
from enum import Enum
from pathlib import Path
from typing import get_args

import pytest
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from lattice.v1 import errors_pb2, resources_pb2, run_pb2

from lattice_server.core.messages import Fact
from lattice_server.core.model import FailureKind, Isolation
from lattice_server.core.states import RunState, TaskState
from lattice_server.rpc.convert.events import EVENTS
from lattice_server.rpc.convert.payloads import FAILURE_KIND_FROM_PROTO, FAILURE_KIND_TO_PROTO
from lattice_server.rpc.convert.resources import ISOLATION_TO_PROTO
from lattice_server.rpc.convert.runs import RUN_STATE_TO_PROTO, TASK_STATE_TO_PROTO

ROOT = Path(__file__).resolve().parent.parent.parent
PROTOS = sorted((ROOT / "proto").rglob("*.proto"))
PACKAGES = ("lattice_client", "lattice_server", "lattice_worker")
DECLARATION = re.compile(r"^\s*(message|enum|service|rpc|oneof) \w+|^\s+[\w.<>, ]+ \w+ = \d+;")


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.name)
def test_every_element_of_the_contract_has_a_comment(path: Path) -> None:
    lines = path.read_text().splitlines()
    bare = [
        f"{path.name}:{number + 1}: {line.strip()}"
        for number, line in enumerate(lines)
        if DECLARATION.match(line) and not lines[number - 1].strip().startswith("//")
    ]
    assert not bare


@pytest.mark.parametrize(
    ("wire", "table", "core"),
    [
        (run_pb2.RunState, RUN_STATE_TO_PROTO, RunState),
        (run_pb2.TaskState, TASK_STATE_TO_PROTO, TaskState),
        (errors_pb2.FailureKind, FAILURE_KIND_TO_PROTO, FailureKind),
        (resources_pb2.Isolation, ISOLATION_TO_PROTO, Isolation),
    ],
)
def test_every_enum_value_translates(wire: EnumTypeWrapper, table: dict[Enum, int], core: type[Enum]) -> None:
    assert set(table) == set(core)
    assert set(table.values()) == set(wire.values()) - {0}


def test_every_run_event_has_a_conversion() -> None:
    assert set(EVENTS) == set(get_args(Fact))
    assert {field for field, _ in EVENTS.values()} == {
        field.name for field in run_pb2.RunEvent.DESCRIPTOR.oneofs_by_name["event"].fields
    }


def test_failure_kinds_translate_both_ways() -> None:
    assert {FAILURE_KIND_FROM_PROTO[proto]: proto for proto in FAILURE_KIND_FROM_PROTO} == FAILURE_KIND_TO_PROTO


@pytest.mark.parametrize("path", PROTOS, ids=lambda path: path.name)
def test_file_names_its_package_in_go_java_and_csharp(path: Path) -> None:
    text = path.read_text()
    for option in (
        'csharp_namespace = "Lattice.V1"',
        'go_package = "lattice/v1;latticev1"',
        "java_multiple_files = true",
        'java_package = "lattice.v1"',
    ):
        assert f"option {option};" in text


def test_every_field_is_read_or_written_by_one_of_the_packages() -> None:
    sources = [path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    words = set(re.findall(r"\w+", "\n".join(sources)))
    unused = [
        field.full_name
        for path in PROTOS
        for message in importlib.import_module(f"lattice.v1.{path.stem}_pb2").DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
        if field.name not in words
    ]
    assert not unused
