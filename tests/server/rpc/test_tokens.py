"""Tokens that are added, removed and expire while a server runs, and the calls they end."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import StatusCode as Code
from lattice.v1 import cluster_pb2, results_pb2, task_pb2, worker_pb2, workflow_pb2

from lattice_server.core.errors import AuthenticationError
from lattice_server.rpc import authentication, callers
from lattice_server.rpc.authentication import Authentication
from lattice_server.rpc.rate_limited_log import LINES
from lattice_server.tokens import Scope, credential, digest_of
from tests.server.apps import NoWorkers, serving_aside
from tests.server.rpc.callers import Caller, calling, function, graph, refused, run, task
from tests.server.rpc.tenants import Signed, bearer, entry, token_of, write_tokens

WITHIN_S = 20.0
LONG_S = 3600.0
STARTED = 3  # The runs of `open_calls`.
KEPT = entry("kept", scopes=["admin"])
GONE = entry("gone", scopes=["submit", "worker"], tenant="t")


@dataclass
class Scene:
    """A server, the file of its tokens, and who shows which."""

    path: Path
    address: str
    kept: Caller
    gone: Caller


@pytest.fixture
def passed_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """By how many seconds the server's wall clock is ahead; the server looks for expired tokens often."""
    ahead = [0.0]
    monkeypatch.setattr(authentication, "MAX_TIMER_S", 0.05)
    monkeypatch.setattr(Authentication.__init__, "__defaults__", (lambda: time.time() + ahead[0],))
    return ahead


@pytest.fixture
def scene(tmp_path: Path, passed_s: list[float]) -> Iterator[Scene]:
    """A server with two tokens, of which a test takes one away."""
    path = write_tokens(tmp_path / "tokens.toml", KEPT, GONE)
    # The workers here give no signs of life.
    with serving_aside(NoWorkers(), tokens_file=str(path), session_ttl_s=60) as address, calling(address) as caller:
        signed = [Caller(Signed(caller.channel, token_of(name))) for name in ("kept", "gone")]
        yield Scene(path, address, *signed)


def code_of(call: Callable[[], Any]) -> Code:
    try:
        call()
    except grpc.RpcError as error:
        found: Any = error
        return found.code()
    return Code.OK


def greet(caller: Caller) -> Code:
    return code_of(lambda: caller.cluster.GetServerInfo(cluster_pb2.GetServerInfoRequest()))


def active_runs(caller: Caller) -> int:
    found: int = caller.cluster.GetServerInfo(cluster_pb2.GetServerInfoRequest()).active_runs
    return found


def becomes(caller: Caller, wanted: Code) -> bool:
    """Whether a caller's calls end in a way soon: a change of the file is seen in the server's own time."""
    deadline = time.monotonic() + WITHIN_S
    while (found := greet(caller)) is not wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    return found is wanted


def open_calls(caller: Caller) -> dict[str, "SimpleQueue[Any]"]:
    """Make a call of each kind that lasts; return where each puts its end."""
    run_id = run(caller).run.run_id
    spec = workflow_pb2.RunWorkflowRequest(workflow=graph(task()))
    wait = Duration(seconds=60)
    own = {"function": function(), "task": task("t", function=""), "wait": wait}
    calls: dict[str, Callable[[], Any]] = {
        "WatchRun": lambda: list(caller.results.WatchRun(results_pb2.WatchRunRequest(run_id=run_id))),
        "ExecuteWorkflow": lambda: list(
            caller.workflows.ExecuteWorkflow(workflow_pb2.ExecuteWorkflowRequest(run=spec))
        ),
        "GetResult": lambda: caller.results.GetResult(results_pb2.GetResultRequest(run_id=run_id, wait=wait)),
        "GetTask": lambda: caller.tasks.GetTask(task_pb2.GetTaskRequest(run_id=run_id, task_id="t", wait=wait)),
        "RunTask": lambda: caller.tasks.RunTask(task_pb2.RunTaskRequest(**own)),
    }
    ends: dict[str, SimpleQueue[Any]] = {}
    for name, call in calls.items():
        ends[name] = SimpleQueue()

        def make(call: Callable[[], Any] = call, end: "SimpleQueue[Any]" = ends[name]) -> None:
            try:
                end.put(call())
            except grpc.RpcError as error:
                end.put(error)

        threading.Thread(target=make, daemon=True).start()
    return ends


def connected(caller: Caller, node_id: str = "n") -> Any:
    """Return a worker's stream that is welcome."""
    said: SimpleQueue[worker_pb2.ConnectRequest | None] = SimpleQueue()
    said.put(
        worker_pb2.ConnectRequest(hello=worker_pb2.Hello(worker_id=f"w-{node_id}", node_id=node_id, protocol_version=1))
    )
    call = caller.workers.Connect(iter(said.get, None))
    call.add_done_callback(lambda _: said.put(None))
    return call


class Entries:
    """Counts the calls whose caller the server knows, from where on they end with their token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._enter = callers.enter
        self._count = 0
        monkeypatch.setattr(callers, "enter", self._note)

    def _note(self, caller: callers.Caller, headers: callers.Metadata = ()) -> None:
        self._enter(caller, headers)
        self._count += caller.subject == "gone"

    def wait(self, count: int) -> None:
        """Wait for this many calls."""
        deadline = time.monotonic() + 30
        while self._count < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self._count == count


@pytest.mark.parametrize("way", ["removed", "expired", "narrowed"])
def test_open_calls_end_when_their_token_no_longer_holds(
    scene: Scene, passed_s: list[float], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "expired":
        later = (datetime.now(UTC) + timedelta(seconds=LONG_S)).isoformat()
        expiring = entry("gone", scopes=["submit", "worker"], tenant="t", expires=later)
        write_tokens(scene.path, KEPT, expiring, entry("new", scopes=["read"]))
        # The calls are made with the credential that expires.
        with calling(scene.address) as stranger:
            assert becomes(Caller(Signed(stranger.channel, token_of("new"))), Code.OK)
    entries = Entries(monkeypatch)
    ends = open_calls(scene.gone)
    entries.wait(len(ends) + 1)
    # A worker that could run nothing must not come before their runs have been let in.
    deadline = time.monotonic() + 30
    while active_runs(scene.kept) < STARTED and time.monotonic() < deadline:
        time.sleep(0.02)
    stream = connected(scene.gone)
    assert next(stream).HasField("welcome")
    if way == "removed":
        write_tokens(scene.path, KEPT)
    elif way == "narrowed":
        write_tokens(scene.path, KEPT, entry("gone", scopes=["read"], tenant="other"))
    else:
        passed_s[0] = LONG_S
    for name, end in ends.items():
        found = end.get(timeout=WITHIN_S + 5)
        assert isinstance(found, grpc.RpcError), f"{name} was answered {found}"
        error: Any = found
        assert error.code() is Code.UNAUTHENTICATED, name
        assert "no longer valid" in error.details()
    for response in stream:
        if response.HasField("close"):
            assert response.close.reason == worker_pb2.CLOSE_REASON_UNAUTHENTICATED
            break
    else:
        pytest.fail("the worker's stream ended without a word")
    stream.cancel()
    assert greet(scene.gone) is (Code.OK if way == "narrowed" else Code.UNAUTHENTICATED)
    assert greet(scene.kept) is Code.OK


def test_tokens_are_added_and_removed_when_the_file_changes(scene: Scene) -> None:
    with calling(scene.address) as stranger:
        new = Caller(Signed(stranger.channel, token_of("new")))
        assert greet(new) is Code.UNAUTHENTICATED
        write_tokens(scene.path, KEPT, entry("new", scopes=["read"]))
        assert becomes(new, Code.OK)
        assert becomes(scene.gone, Code.UNAUTHENTICATED)
        scene.path.write_text("")  # written in place
        assert becomes(new, Code.UNAUTHENTICATED)
        assert greet(scene.kept) is Code.UNAUTHENTICATED


@pytest.mark.parametrize("harm", ["broken", "readable", "removed", "half"])
def test_tokens_stay_when_the_file_is_wrong(scene: Scene, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    ends = open_calls(scene.gone)
    match harm:
        case "broken":
            scene.path.write_text(KEPT + "[[token]\n")
        case "readable":
            scene.path.chmod(0o644)
        case "removed":
            scene.path.unlink()
        case "half":
            file = scene.path.open("w")
            file.write(KEPT)
            file.flush()
            (scene.path.parent / "neighbour").write_text("which changes meanwhile")
    deadline = time.monotonic() + WITHIN_S
    while harm != "half" and "its earlier content stays valid" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    assert ("its earlier content stays valid" in caplog.text) == (harm != "half")
    assert greet(scene.gone) is greet(scene.kept) is Code.OK
    assert all(end.empty() for end in ends.values())
    if harm == "half":
        file.close()
    else:
        write_tokens(scene.path, KEPT)
    assert becomes(scene.gone, Code.UNAUTHENTICATED)
    assert greet(scene.kept) is Code.OK


def test_token_expires_by_the_wall_clock() -> None:
    now = [1000.0]

    def shown() -> str:
        return tokens.authenticate(bearer("t")).subject

    tokens = Authentication([credential("x", digest_of("t"), [Scope.READ], expires_s=1060.0)], lambda: now[0])
    assert shown() == "x"
    now[0] += 3600
    with pytest.raises(AuthenticationError, match="no longer valid"):
        shown()
    now[0] -= 7200
    assert shown() == "x"


@pytest.mark.parametrize(
    "value", [b"Bearer \xff\xfe", "Bearer", "Bearer  ", "", "Bearer " + "x" * 100_000, "Bearer é\u202e", b"\x00"]
)
def test_odd_tokens_are_not_valid(value: str | bytes) -> None:
    tokens = Authentication([credential("x", digest_of("t"), [Scope.READ])])
    with pytest.raises(AuthenticationError, match="not valid here"):
        tokens.authenticate([("authorization", value)])


def test_log_lines_are_limited_when_many_tokens_are_wrong(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), calling(scene.address) as stranger:
        for number in range(3 * LINES):
            caller = Caller(Signed(stranger.channel, f"wrong-{number}"))
            with refused(Code.UNAUTHENTICATED, "UNAUTHENTICATED"):
                caller.cluster.GetServerInfo(cluster_pb2.GetServerInfoRequest())
    lines = [record for record in caplog.records if record.getMessage().startswith("refused")]
    assert 0 < len(lines) <= LINES
    assert "wrong-" not in caplog.text


def test_node_belongs_to_the_subject_that_registered_it(tmp_path: Path) -> None:
    path = write_tokens(
        tmp_path / "tokens.toml",
        entry("one", scopes=["worker"]),
        entry("two", scopes=["worker"]),
        entry("narrow", scopes=["worker"], nodes='["gpu-*"]'),
    )
    with serving_aside(NoWorkers(), tokens_file=str(path), session_ttl_s=60) as address, calling(address) as stranger:
        one, two, narrow = (Caller(Signed(stranger.channel, token_of(name))) for name in ("one", "two", "narrow"))
        first = connected(one, "n")
        assert next(first).HasField("welcome")
        assert "another subject's" in closed(connected(two, "n"))
        hello = worker_pb2.Hello(worker_id="w-n", node_id="elsewhere", protocol_version=1)
        assert "another subject's" in closed(said(two, worker_pb2.ConnectRequest(hello=hello)))
        join = worker_pb2.Join(node_id="n", protocol_version=1)
        assert "another subject's" in closed(said(two, worker_pb2.ConnectRequest(join=join)))
        assert "not for node 'n2'" in closed(connected(narrow, "n2"))
        assert next(connected(narrow, "gpu-1")).HasField("welcome")
        again = connected(one, "n")
        assert next(again).HasField("welcome"), "its own node it may have again"


def test_node_that_is_lost_may_belong_to_another_subject(tmp_path: Path) -> None:
    entries = [entry(name, scopes=["worker"]) for name in ("one", "two")]
    path = write_tokens(tmp_path / "tokens.toml", *entries)
    with serving_aside(NoWorkers(), tokens_file=str(path), session_ttl_s=0.3) as address, calling(address) as stranger:
        one, two = (Caller(Signed(stranger.channel, token_of(name))) for name in ("one", "two"))
        first = connected(one)
        assert next(first).HasField("welcome")
        first.cancel()
        deadline = time.monotonic() + WITHIN_S
        while (answer := next(connected(two))).HasField("close") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert answer.HasField("welcome")


def said(caller: Caller, request: worker_pb2.ConnectRequest) -> Any:
    queue: SimpleQueue[worker_pb2.ConnectRequest | None] = SimpleQueue()
    queue.put(request)
    call = caller.workers.Connect(iter(queue.get, None))
    call.add_done_callback(lambda _: queue.put(None))
    return call


def closed(call: Any) -> str:
    """Return why a stream was refused."""
    answer = next(call)
    call.cancel()
    assert answer.close.reason == worker_pb2.CLOSE_REASON_UNAUTHENTICATED
    text: str = answer.close.message
    return text


def test_no_descriptor_is_left_when_a_server_stops(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens.toml", KEPT)

    def watches() -> int:
        links = (os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_open(name))
        return sum("inotify" in link for link in links)

    before = watches()
    with serving_aside(NoWorkers(), tokens_file=str(path)) as address, calling(address) as caller:
        assert greet(Caller(Signed(caller.channel, token_of("kept")))) is Code.OK
        assert watches() == before + 1
    assert watches() == before


def _is_open(name: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{name}")
