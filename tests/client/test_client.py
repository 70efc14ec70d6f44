"""The public client: its names, its exceptions, the bundle of a function, and the id of a run."""

import asyncio
import re
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2

import lattice_client
from lattice_client import (
    AlreadyExistsError,
    LangGraphClient,
    LatticeClient,
    Run,
    TaskFailedError,
    UnavailableError,
    errors,
    task,
)
from lattice_client.code.function import pack
from lattice_client.transport import statuses

PUBLIC = [
    "AbortedError",
    "AlreadyExistsError",
    "AsyncLatticeClient",
    "AsyncLatticeWorkflow",
    "AsyncOpenRun",
    "AsyncRun",
    "Chunk",
    "ClientClosedError",
    "DecodeError",
    "ForkError",
    "InternalError",
    "InvalidArgumentError",
    "LangGraphClient",
    "LatticeClient",
    "LatticeError",
    "LatticeTask",
    "LatticeWorkflow",
    "NotFoundError",
    "OpenRun",
    "OutOfRangeError",
    "Parameter",
    "PermissionDeniedError",
    "PreconditionError",
    "Progress",
    "Question",
    "RequestError",
    "ResourceExhaustedError",
    "Run",
    "RunCancelledError",
    "RunError",
    "RunEvent",
    "RunTimeoutError",
    "SecurityError",
    "ServiceFailedError",
    "StreamInterruptedError",
    "TaskDefinition",
    "TaskDefinitionError",
    "TargetError",
    "TaskFailedError",
    "TaskOutput",
    "UnauthenticatedError",
    "UnavailableError",
    "UntrustedPayloadError",
    "context",
    "entrypoint",
    "secret",
    "task",
    "template",
]


def test_the_public_names_are_these_and_all_documented() -> None:
    assert sorted(PUBLIC) == sorted(lattice_client.__all__)
    assert not [name for name in PUBLIC if not getattr(lattice_client, name).__doc__]


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_status_has_its_exception_class_with_the_details(code: grpc.StatusCode) -> None:
    status = status_pb2.Status(code=code.value[0], message="no")
    info = error_details_pb2.ErrorInfo(reason="SOME_REASON", domain="lattice", metadata={"k": "v"})
    violation = error_details_pb2.BadRequest.FieldViolation(field='tasks[0].inputs["x"]', description="is bad")
    for detail in (info, error_details_pb2.BadRequest(field_violations=[violation])):
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    trailers = grpc.aio.Metadata(("other", "x"), (statuses.DETAILS, status.SerializeToString()))
    error = statuses.from_rpc(grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers, "no"), "host:1")
    assert type(error) is statuses.CLASSES.get(code, errors.InternalError)
    assert str(error) == (f"no; {error.advice}" if error.advice else "no")
    assert bool(error.advice) is (code in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED})
    assert (error.reason, error.metadata) == ("SOME_REASON", {"k": "v"})
    assert error.violations == {'tasks[0].inputs["x"]': "is bad"}


def test_docstring_draws_the_tree_of_exception_classes() -> None:
    drawn: dict[str, str] = {}
    path: list[str] = []
    for bars, branch, name in re.findall(r"^ {4}([| ]*)(\+-- )?(\w+Error)\b", errors.__doc__ or "", re.MULTILINE):
        path[len(bars) // 4 + bool(branch) :] = [name]
        drawn[name] = path[-2] if branch else ""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LatticeError)]
    parents = {kind.__name__: kind.__bases__[0].__name__ for kind in kinds if kind is not errors.LatticeError}
    assert drawn == {"LatticeError": "", **parents}
    assert all(issubclass(kind, errors.RequestError) for kind in statuses.CLASSES.values())


@pytest.mark.parametrize(
    "details",
    [
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: "
        "Failed to connect to remote host: Connection refused",
        "failed to connect to all addresses; last error: UNKNOWN: ipv6:%5B::1%5D:1: "
        "Failed to connect to remote host: Connection refused",
    ],
)
def test_unreachable_server_is_named_with_the_cause_and_advice(details: str) -> None:
    failed = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
    text = (
        "no Lattice server answers at host:1: Connection refused; start a server with `lattice start --head`, or check"
    )
    assert str(statuses.from_rpc(failed, "host:1")) == f"{text} the address"


@pytest.mark.parametrize(
    ("details", "advice"),
    [
        ("errors resolving a.example:1: [field:hostname lookup error:no answer]", "its name"),
        ("DNS resolution failed for a.example:1: C-ares status is not ARES_SUCCESS", "its name"),
        ("last error: UNKNOWN: getsockopt(SO_ERROR): No route to host", "no route leads to the host"),
        ("last error: ipv4:10.9.9.9:1: connect failed: error: Network is unreachable", "no route leads to the host"),
    ],
)
def test_a_host_that_cannot_be_reached_is_no_reason_to_start_a_server(details: str, advice: str) -> None:
    failed = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
    found = statuses.from_rpc(failed, "host:1")
    assert advice in found.advice
    assert str(found).endswith(found.advice)
    assert statuses.START not in str(found)


def test_call_raises_unavailable_when_no_server_listens() -> None:
    with LatticeClient("127.0.0.1:1") as nobody, pytest.raises(UnavailableError):
        nobody.server_info()


def project(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


SCRIPT = """
import sys
from lattice_client.code import function
{imports}
def work():
    pass
bundle = function.pack({function}).bundle
sys.stdout.buffer.write(bundle.zip if bundle else b"")
"""


@pytest.mark.parametrize(
    ("files", "imports", "function", "expected"),
    [
        ({}, "import json, numpy", "work", None),
        ({"helper.py": "import other", "other.py": "", "unused.py": ""}, "import helper", "work", "helper.py other.py"),
        (
            {"pack/__init__.py": "", "pack/inner.py": "from . import data", "pack/data.py": "", "aside.py": ""},
            "from pack.inner import data",
            "work",
            "pack/__init__.py pack/data.py pack/inner.py",
        ),
        ({"tasks.py": "import low\ndef f(): pass", "low.py": ""}, "import tasks", "tasks.f", "low.py tasks.py"),
        (
            {"pack/__init__.py": "", "pack/sub/__init__.py": "", "pack/sub/deep.py": "def f(): pass"},
            "import pack.sub.deep",
            "pack.sub.deep.f",
            "pack/__init__.py pack/sub/__init__.py pack/sub/deep.py",
        ),
        ({"bad.py": "this is no Python"}, "if not sys: import bad", "work", "bad.py"),
    ],
    ids=["nothing", "two files", "package", "in a module", "in a package", "unreadable"],
)
def test_the_users_own_modules_travel_and_no_others(
    tmp_path: Path, files: dict[str, str], imports: str, function: str, expected: str | None
) -> None:
    project(tmp_path, files | {"script.py": SCRIPT.format(imports=imports, function=function)})
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, check=True, cwd="/")
    names = zipfile.ZipFile(BytesIO(done.stdout)).namelist() if done.stdout else None
    assert names == (expected and expected.split())


def test_bundle_is_equal_when_it_is_made_again(tmp_path: Path) -> None:
    project(tmp_path, {"low.py": "", "script.py": SCRIPT.format(imports="import low", function="work")})
    command = [sys.executable, str(tmp_path / "script.py")]
    made = []
    for _ in range(2):
        (tmp_path / "low.py").touch()
        made.append(subprocess.run(command, capture_output=True, check=True).stdout)
    assert made[0] == made[1] != b""


def test_bundle_has_the_new_content_when_a_file_was_edited(tmp_path: Path) -> None:
    edit = "work()\nopen(low.__file__, 'w').write('import extra')\nopen(low.__file__[:-6] + 'extra.py', 'w').close()"
    body = SCRIPT.format(imports="import low", function="work").replace(
        "bundle =", f"function.pack(work)\n{edit}\nbundle ="
    )
    project(tmp_path, {"low.py": "", "script.py": body})
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, check=True, cwd="/")
    assert zipfile.ZipFile(BytesIO(done.stdout)).namelist() == ["extra.py", "low.py"]


def test_plain_function_has_one_definition_when_it_is_added_twice(client: LatticeClient) -> None:
    def double(x: int) -> int:
        return 2 * x

    workflow = client.create_workflow()
    added = [workflow.add_task(double, {"x": number}) for number in range(3)]
    assert len({id(member.definition) for member in added}) == 1
    assert len(workflow.run().result(timeout=60)) == 3


def test_an_installed_function_needs_no_bundle() -> None:
    assert pack(zipfile.is_zipfile)[1] is None


@task
def collect(value: Any) -> Any:
    return value


@task
def one() -> int:
    return 1


def test_outputs_are_found_anywhere_in_lists_tuples_and_dicts(client: LatticeClient) -> None:
    workflow = client.create_workflow()
    wired = workflow.add_task(one).output
    value = {"deep": [[{"x": (wired, 2, b"raw")}], wired], "plain": (1,), "none": None}
    workflow.add_task(collect, {"value": value})
    expected = {"deep": [[{"x": (1, 2, b"raw")}], 1], "plain": (1,), "none": None}
    assert workflow.run().result(timeout=60) == {"result": expected}


def test_a_run_is_its_id(client: LatticeClient) -> None:
    workflow = client.create_workflow("named")
    workflow.add_task(one)
    run = workflow.run()
    assert isinstance(run, str)
    assert isinstance(run, Run)
    assert run == run.run_id == str(run) == client.get_run(run)
    assert {run: 1}[run.run_id] == 1
    assert run.result(timeout=60) == {"result": 1}
    assert run.status() == "succeeded"
    assert client.describe_run(run).display_name == "named"
    assert [(found.task_id, list(found.predecessor_task_ids)) for found in client.run_graph(run)] == [("one", [])]
    assert run in [found.run_id for found in client.list_runs()]


def test_runs_are_listed_that_no_page_holds_together(client: LatticeClient) -> None:
    @task
    def fail_at_length() -> None:
        raise ValueError("x" * 600_000)

    runs = []
    for _ in range(3):
        workflow = client.create_workflow("long")
        workflow.add_task(fail_at_length)
        runs.append(workflow.run())
        with pytest.raises(TaskFailedError):
            runs[-1].result(timeout=60)
    assert [found.run_id for found in client.list_runs(3)] == runs[::-1]
    assert [found.run_id for found in client.list_runs(2)] == runs[:0:-1]


def test_functions_run_on_the_server_in_all_three_forms(address: str) -> None:
    lattice = LangGraphClient(address)

    @lattice.task
    def bare(state: dict[str, int], *, plus: int = 1) -> dict[str, int]:
        """Count."""
        return {"n": state["n"] + plus}

    @lattice.task(resources={"cpu": 1, "cpu_mem": 10})
    def in_a_dict(*numbers: int) -> int:
        return sum(numbers)

    @lattice.task(cpu=0.5)
    async def direct(text: str) -> str:
        return text.upper()

    assert bare({"n": 1}) == {"n": 2}
    assert bare(state={"n": 1}, plus=5) == {"n": 6}
    assert in_a_dict(1, 2, 3) == 6
    assert asyncio.run(direct("x")) == "X"
    assert (bare.__name__, bare.__doc__) == ("bare", "Count.")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'state'"):
        bare()


def test_an_exception_of_a_node_comes_back(address: str) -> None:
    @LangGraphClient(address).task
    def fail(state: dict[str, int]) -> None:
        raise LookupError("nothing there")

    with pytest.raises(LookupError, match="nothing there") as caught:
        fail({})
    assert "in fail" in str(caught.value.__cause__), "the traceback of the worker"


def test_run_returns_the_existing_run_when_the_id_is_repeated(client: LatticeClient) -> None:
    run_id = f"nightly-{uuid4().hex}"

    def start(number: int, text: str) -> Run:
        @task
        def say(text: str, tags: set[int]) -> list[object]:
            return [text, number]

        workflow = client.create_workflow()
        workflow.add_task(say, {"text": text, "tags": {number}}, "say")
        return workflow.run(run_id=run_id)

    first = start(1, "a")
    assert first.result() == {"result": ["a", 1]}
    assert start(2, "a").result() == {"result": ["a", 1]}, "code and pickled values may have other bytes"
    with pytest.raises(AlreadyExistsError):
        start(1, "b")
