"""Digests of functions: client and server follow the rule of the contract."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor
from lattice.v1 import resources_pb2, task_pb2

import lattice_client.convert.digests
from lattice_server.rpc.convert import functions

CONTRACT = Path(__file__).resolve().parents[2] / "proto" / "lattice" / "v1" / "task.proto"
RULE = re.compile(r"^// A function: code.*?^message Function \{", re.DOTALL | re.MULTILINE)
Digest = Callable[[task_pb2.Function], str]

FULL = task_pb2.Function(
    entrypoint="a/ü",
    python=task_pb2.PythonFunction(
        pickle=b"\0code",
        call_style=task_pb2.CALL_STYLE_KEYWORDS,
        return_style=task_pb2.RETURN_STYLE_VALUE,
        concurrency=task_pb2.CONCURRENCY_ASYNC,
    ),
    bundle_digest="sha256:bundle",
    runtime=resources_pb2.Runtime(language="python", version="3.11"),
    display_name="name",
)
PARTS = (
    b"entrypoint\x004\x00a/\xc3\xbc"
    b"python.pickle\x005\x00\0code"
    b"python.call_style\x001\x002"
    b"python.return_style\x001\x002"
    b"python.concurrency\x001\x002"
    b"bundle_digest\x0013\x00sha256:bundle"
    b"runtime.language\x006\x00python"
    b"runtime.version\x004\x003.11"
    b"display_name\x004\x00name"
)
SOURCE = task_pb2.Function(python={"source": {"code": "def f(): pass", "name": "f"}})
SOURCE_PARTS = b"python.source.code\x0013\x00def f(): passpython.source.name\x001\x00f"


@pytest.fixture(
    params=[lattice_client.convert.digests.digest_of, functions.digest_of],
    ids=["client", "server"],
)
def digest(request: pytest.FixtureRequest) -> Digest:
    found: Digest = request.param
    return found


@pytest.mark.parametrize(("function", "parts"), [(FULL, PARTS), (SOURCE, SOURCE_PARTS), (task_pb2.Function(), b"")])
def test_a_digest_is_made_of_the_parts_the_contract_names(
    function: task_pb2.Function, parts: bytes, digest: Digest
) -> None:
    assert digest(function) == f"sha256:{hashlib.sha256(parts).hexdigest()}"
    claimed = task_pb2.Function(digest="sha256:0")
    claimed.MergeFrom(function)
    assert digest(claimed) == digest(function)


def test_the_example_in_the_contract_is_right(digest: Digest) -> None:
    (example,) = re.findall("sha256:[0-9a-f]{64}", CONTRACT.read_text())
    assert digest(task_pb2.Function(entrypoint="statistics:mean")) == example


def test_the_contract_names_every_field_that_a_digest_is_made_of() -> None:
    found = RULE.search(CONTRACT.read_text())
    assert found is not None
    named = set(re.findall(r"`([\w.]+)`", found[0]))
    messages = {FieldDescriptor.TYPE_MESSAGE}

    def paths(descriptor: object, before: str = "") -> list[str]:
        return [
            path
            for field in descriptor.fields  # type: ignore[attr-defined]
            for path in (
                paths(field.message_type, f"{before}{field.name}.") if field.type in messages else [before + field.name]
            )
        ]

    assert set(paths(task_pb2.Function.DESCRIPTOR)) - {"digest"} <= named
