"""Frames and the agent's guard, with generated input: a frame is read whole or refused, and every lease ends once."""

import asyncio
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lattice.v1 import errors_pb2, payload_pb2, resources_pb2, task_pb2, worker_pb2

from lattice_worker.attempts.attempt_executor import AttemptExecutor
from lattice_worker.attempts.attempt_reports import AttemptReports
from lattice_worker.attempts.output_reports import OutputReports
from lattice_worker.attempts.questions import Questions
from lattice_worker.attempts.streams import Streams
from lattice_worker.pool.runner_pool import Pool
from lattice_worker.runner import frames
from lattice_worker.runner.frames import (
    FIRST,
    LAST,
    MIDDLE,
    SEVERAL,
    WHOLE,
    Assembler,
    ProtocolError,
    joined,
    packets_of,
    parse,
)
from lattice_worker.session.limits import Limits
from lattice_worker.store.artifact_staging import ArtifactStaging
from lattice_worker.store.local_store import LocalStore
from tests.examples import examples
from tests.worker.processes import FakeProcess, FakeZygotes, packet_of, settle, succeeded

pytestmark = pytest.mark.slow

VALUES = [0, 1, -1, 2**31, 2**63, -(2**63), True, None, -1.0, 1e300, 0.1]
VALUES += ["a" * 300, "/etc/passwd", "..", "", "\0", "user_error", "cancelled", "x/y", "é", "😀"]
ODD = [*VALUES, 10**400, float("nan"), float("inf"), "\ud83d"]
KINDS = [WHOLE, FIRST, MIDDLE, LAST, SEVERAL]
Frame = tuple[dict[str, Any], list[bytes]]


def junk(choice: random.Random, values: Sequence[Any] = ODD, depth: int = 2) -> Any:
    """Return one of `values`, a text, or something made of those."""
    kind = choice.randrange(6 if depth else 4)
    if kind == 4:
        return [junk(choice, values, depth - 1) for _ in range(choice.randrange(3))]
    if kind == 5:
        return {text(choice): junk(choice, values, depth - 1) for _ in range(choice.randrange(3))}
    return choice.choice(values) if kind else text(choice)


def text(choice: random.Random) -> str:
    """Return text of a few characters."""
    found = (choice.choice([choice.randrange(128), choice.randrange(0x110000)]) for _ in range(choice.randrange(5)))
    return "".join(map(chr, found)).encode(errors="ignore").decode()


def frame(choice: random.Random) -> Frame:
    """Return a frame."""
    header = {text(choice): junk(choice, VALUES) for _ in range(choice.randrange(4))}
    return header, [choice.randbytes(choice.randrange(300)) for _ in range(choice.randrange(4))]


def packet(choice: random.Random) -> bytes:
    """Return a packet of garbage that may begin like one of a frame."""
    return choice.choice([b"", *KINDS]) + choice.randbytes(choice.randrange(60))


@pytest.fixture
def small_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packets so small that most frames take several."""
    monkeypatch.setattr(frames, "PACKET_BYTES", 64)


def read(packets: list[bytes]) -> list[Frame]:
    """Return the frames in packets. Raises ProtocolError."""
    assembler = Assembler()
    return [parse(frame) for packet in packets for frame in assembler.feed(packet)]


def same(one: Frame, other: Frame) -> bool:
    """Whether two frames are equal, numbers of the same types."""
    return json.dumps(one[0]) == json.dumps(other[0]) and list(one[1]) == list(other[1])


@pytest.mark.usefixtures("small_packets")
@examples(15_000)
@given(seed=st.integers(0, 2**64))
def test_a_frame_is_read_as_it_was_sent(seed: int) -> None:
    choice = random.Random(seed)
    sent = [frame(choice) for _ in range(choice.randrange(4))]
    single = [packet for header, blobs in sent for packet in packets_of(header, blobs)]
    for packets in (single, list(joined(single))):
        found = read(packets)
        assert len(found) == len(sent)
        assert all(map(same, found, sent))
        assert all(len(packet) <= frames.PACKET_BYTES for packet in packets)


@pytest.mark.usefixtures("small_packets")
@examples(1_000)
@given(sizes=st.lists(st.integers(0, 5)))
def test_whole_frames_are_joined_up_to_the_size_of_a_packet(sizes: list[int]) -> None:
    whole = [packets_of({}, [bytes(size)])[0] for size in sizes]
    packets = list(joined(whole))
    assert len(read(packets)) == len(whole)
    # No packet could have had the first frame of the next one.
    firsts = [len(Assembler().feed(packet)[0]) for packet in packets]
    ends = [len(packet) if packet[:1] == SEVERAL else len(packet) + 4 for packet in packets]
    assert all(end + 4 + first > frames.PACKET_BYTES for end, first in zip(ends, firsts[1:], strict=False))


@pytest.mark.usefixtures("small_packets")
@pytest.mark.parametrize("damage", ["cut", "drop", "twice", "swap", "insert", "interleave"])
@examples(4_000)
@given(seed=st.integers(0, 2**64))
def test_a_damaged_frame_is_refused_or_read_as_it_was_sent(damage: str, seed: int) -> None:
    choice = random.Random(seed)
    original = frame(choice)
    packets = packets_of(*original)
    if len(packets) == 1 and choice.random() < 0.5:
        packets = list(joined([*packets, *packets_of({"other": 2}, [])]))
    at = choice.randrange(len(packets))
    garbage = packet(choice)
    match damage:
        case "cut":
            packets[at] = packets[at][: choice.randrange(len(packets[at]))]
        case "drop":
            del packets[at]
        case "twice":
            packets.insert(choice.randrange(len(packets) + 1), packets[at])
        case "swap":
            other = choice.randrange(len(packets))
            packets[at], packets[other] = packets[other], packets[at]
        case "insert":
            packets.insert(choice.randrange(len(packets) + 1), garbage)
        case _:
            pairs = zip(packets, packets_of({"other": 1}, [b"x" * 70]), strict=False)
            packets = [packet for pair in pairs for packet in pair]
    try:
        found = read(packets)
    except ProtocolError:
        return
    found = [one for one in found if "other" not in one[0]]
    # Parts of one frame that changed places may say the same length: the kernel does not do that.
    assert damage == "swap" or all(same(one, original) for one in found)
    assert len(found) <= (2 if damage == "twice" else 1)


@examples(48_000)
@given(seed=st.integers(0, 2**64))
def test_garbage_is_refused_and_raises_nothing_else(seed: int) -> None:
    choice = random.Random(seed)
    packets = [packet(choice) for _ in range(choice.randrange(6))]
    if choice.random() < 0.5:
        packets += packets_of(*frame(choice))
        damaged_packet = bytearray(packets[-1])
        damaged_packet[choice.randrange(len(damaged_packet))] ^= 1 << choice.randrange(8)
        packets[-1] = bytes(damaged_packet)
    try:
        found = read(packets)
    except ProtocolError:
        return
    assert all(isinstance(header, dict) and isinstance(blobs, list) for header, blobs in found)


# The guard: an agent's attempts and runners, with processes that send generated frames.


class Scene:
    """Attempts on a pool of fake processes. `ends` are the reports that end leases, by lease and item."""

    def __init__(self, staging: ArtifactStaging, folder: Path) -> None:
        self.zygotes = FakeZygotes()
        self.pool = Pool(1, staging, self.zygotes)
        local_store = LocalStore(str(folder), "n", staging, lambda: None)
        limits = Limits(question_bytes=100, chunk_bytes=100)
        self.reports = AttemptReports(local_store, limits, OutputReports(self._emit), self._ended)
        self.questions, streams = Questions(self._emit, limits, local_store), Streams(self._emit, limits)
        self.executor = AttemptExecutor(
            self.pool, local_store, self.reports, self.questions, streams, limits, lambda digest: None
        )
        self.ends: list[tuple[str, int, str]] = []
        self.ended: Counter[str] = Counter()
        self.kinds: dict[str, int] = {}

    def _emit(self, report: worker_pb2.Report) -> None:
        report.SerializeToString()
        fact = report.WhichOneof("fact")
        if fact == "asked":
            assert report.asked.number > 0
            assert not report.asked.payload.HasField("artifact")
            assert self.ended[report.lease_id] == 0, "a lease that is over asks"
        if fact in {"succeeded", "failed", "returned"}:
            self.ends.append((report.lease_id, report.item, fact))
            if fact == "failed":
                self.kinds[report.lease_id] = report.failed.failure.kind

    def _ended(self, lease_id: str, outputs: Any) -> None:
        self.ended[lease_id] += 1

    def assign(self, lease_id: str, size: int, *, is_async: bool) -> worker_pb2.Assignment:
        """Start a lease."""
        concurrency = task_pb2.CONCURRENCY_ASYNC if is_async else task_pb2.CONCURRENCY_PROCESS
        python = task_pb2.PythonFunction(pickle=b"x", concurrency=concurrency)
        function = task_pb2.Function(digest=f"sha256:{is_async}", python=python)
        self.executor.learn([function], [])
        payload = payload_pb2.Binding(payload=payload_pb2.Payload(media_type="application/json", json="1"))
        assignment = worker_pb2.Assignment(
            lease_id=lease_id,
            function_digest=function.digest,
            outputs=["out"],
            isolation=resources_pb2.ISOLATION_NONE,
            batched=size > 1,
            attempts=[
                worker_pb2.Attempt(run_id="r", task_id=f"{lease_id}-{item}", number=1, inputs={"x": payload})
                for item in range(size)
            ],
        )
        self.executor.start(assignment)
        return assignment

    def check(self, sizes: dict[str, int]) -> None:
        """Assert that every lease ended once, typed, in as many reports as it has members, and nothing is left."""
        for lease_id, size in sizes.items():
            own = [(item, fact) for lease, item, fact in self.ends if lease == lease_id]
            if own != [(0, "returned")]:
                assert sorted(item for item, _ in own) == list(range(size)), (lease_id, own)
                assert {fact for _, fact in own} <= {"succeeded", "failed"}
            assert self.ended[lease_id] == 1, (lease_id, self.ended)
        assert set(self.ended) == set(sizes)
        assert all(kind in set(errors_pb2.FailureKind.values()) - {0} for kind in self.kinds.values())
        assert self.executor.is_idle
        assert self.reports.is_idle
        assert not self.questions._unanswered
        self.pool.check()
        assert not any(runner.running or runner.pipeline for runner in self.pool._all if runner.is_fit)


@pytest.fixture(autouse=True)
def _quiet_log(caplog: pytest.LogCaptureFixture) -> None:
    """Log no process that is ended: all of them are."""
    caplog.set_level("ERROR", "lattice_worker")


@pytest.fixture(scope="module")
def staging() -> Iterator[tuple[ArtifactStaging, Path]]:
    """A store of large values."""
    with tempfile.TemporaryDirectory() as folder:
        found = ArtifactStaging(folder)
        with found.opened():
            yield found, Path(folder)


PATHS = ["kind", "id", "made", "duration", "has_raw", "outputs", "split", "items", "failure", "out", "type", "blob"]
PATHS += [
    "message",
    "exception",
    "base_types",
    "traceback",
    "exit_status",
    "parts",
    "truncated",
    "is_over",
    "task",
    "item",
    "number",
]
PATHS += ["name", "payload"]


def damaged(value: Any, key: str, change: Any) -> Any:
    """Return a frame in which a key is dropped, or has another value, wherever it stands."""
    if isinstance(value, dict):
        kept = {k: damaged(v, key, change) for k, v in value.items() if k != key or change != "drop"}
        return kept | ({key: change} if key in kept else {})
    return [damaged(item, key, change) for item in value] if isinstance(value, list) else value


def speak(process: FakeProcess, choice: random.Random) -> None:
    """Have a process send something: a frame, most likely damaged, or garbage."""
    kind = choice.choice(
        ["answer", "answer", "answer", "log", "spawn", "ask", "ask", "describing", "failure", "any", "packets"]
    )
    if kind == "packets":
        for _ in range(choice.randrange(1, 4)):
            process.send(packet(choice))
        return
    changes = [
        (choice.choice(PATHS), "drop" if choice.random() < 0.3 else junk(choice)) for _ in range(choice.randrange(3))
    ]
    extra = {choice.choice(PATHS): junk(choice) for _ in range(choice.randrange(3))}
    named = choice.choice(["a", "b", "c", "unknown"])
    count = choice.randrange(5)
    found = [header for header in process.invocations if header["id"] == named]
    invocation = found[0] if found else {"id": named, "outputs": ["out"], "batched": False, "items": [{}]}
    blobs: list[bytes] = []
    header: dict[str, Any]
    match kind:
        case "log":
            header = {"kind": "log", "id": named, "parts": [["stdout", "text"]] * count, "truncated": False}
        case "spawn":
            task = {"spec": 0, "function": 0, "code": 0, "task_id": "t", "name": "t", "after": [], "inputs": {}}
            header, blobs = {"kind": "spawn", "id": named, "task": task, "made": []}, [b""]
        case "ask":
            asked = {"item": count % 2, "number": count, "name": "q", "payload": {"type": "x/y", "blob": 0}}
            header, blobs = {"kind": "ask", "id": named} | asked, [b"1"]
        case "describing":
            header = {"kind": "describing", "id": named, "is_over": bool(count % 2)}
        case "failure":
            failure = {"kind": "user_error", "type": "E", "message": "m", "traceback": "t", "base_types": ["B"]}
            header = succeeded(invocation, blobs) | {"failure": failure}
        case "any":
            header = {"kind": "result", "id": named} | extra
        case _:
            header = succeeded(invocation, blobs)
            if count == 4 and "items" in header:
                header["items"] = header["items"][1:]
    for key, change in changes:
        header = damaged(header, key, change)
    process.send(packet_of(header, blobs))


def test_a_lease_ends_when_its_process_lives_on_after_an_unreadable_answer(
    staging: tuple[ArtifactStaging, Path],
) -> None:
    async def scene() -> None:
        scene = Scene(*staging)
        scene.zygotes.is_silent = True
        scene.assign("a", 1, is_async=False)
        await settle(lambda: any(process.invocations for process in scene.zygotes.processes))
        (process,) = [process for process in scene.zygotes.processes if process.invocations]
        process.say({"kind": "result", "id": "a"})
        await settle(lambda: scene.ended["a"] == 1)
        assert scene.kinds == {"a": errors_pb2.FAILURE_KIND_INTERNAL}
        scene.pool.close()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})

    asyncio.run(scene())


@examples(12_000)
@given(seed=st.integers(0, 2**64))
def test_every_lease_ends_once_when_its_process_sends_damaged_frames(
    staging: tuple[ArtifactStaging, Path], seed: int
) -> None:
    choice = random.Random(seed)
    is_async = choice.random() < 0.5
    sizes = {name: choice.randrange(1, 4) for name in choice.sample("abc", choice.randrange(1, 4))}
    stopped = {name for name in sizes if choice.random() < 0.3}

    async def scene() -> None:
        scene = Scene(*staging)
        scene.zygotes.is_silent = True
        for lease_id, size in sizes.items():
            scene.assign(lease_id, size, is_async=is_async)
        wanted = 1 if is_async else len(sizes)
        await settle(lambda: sum(len(p.invocations) for p in scene.zygotes.processes) == len(sizes))
        processes = scene.zygotes.processes[:wanted]
        scene.zygotes.is_silent = False
        for _ in range(choice.randrange(6)):
            speak(choice.choice(processes), choice)
            if choice.random() < 0.3:
                await asyncio.sleep(0)
        for runner in list(scene.pool._all):
            runner.process.marks.memory[:8] = choice.randrange(5).to_bytes(8, "little")
        await asyncio.sleep(0)
        for lease_id in stopped:
            scene.executor.stop(lease_id, "cancelled", "the attempt was cancelled")
        for _ in range(3):
            await asyncio.sleep(0)
        for process in processes:
            process.end(choice.choice([0, 1, -9, -11]))
        await settle(lambda: sum(scene.ended.values()) >= len(sizes) and scene.executor.is_idle)
        for _ in range(5):
            await asyncio.sleep(0)
        scene.assign("after", 1, is_async=is_async)
        await settle(lambda: scene.ended["after"] > 0)
        assert [fact for lease, _, fact in scene.ends if lease == "after"] == ["succeeded"]
        await settle(lambda: scene.pool._refilling is None or scene.pool._refilling.done())
        scene.check(sizes | {"after": 1})
        scene.pool.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*tasks)

    asyncio.run(scene())
