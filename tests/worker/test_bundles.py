"""Bundles in a folder that workers share: there while a worker has them, and gone with the last one."""

import asyncio
import io
import os
import random
import time
import zipfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from lattice.v1 import task_pb2, worker_pb2

from lattice_worker.store.bundles import NEW_S, Bundles
from tests.e2e.proxy import Gate
from tests.worker.head import TIMEOUT_S, Pair, pair

DIGEST = "sha256:abc"


def bundle(digest: str = DIGEST, text: str = "VALUE = 1") -> task_pb2.CodeBundle:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("shared_module.py", text)
    return task_pb2.CodeBundle(digest=digest, zip=data.getvalue())


def play(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await scenario()

    asyncio.run(run())


async def learn(worker: Bundles, digest: str = DIGEST) -> Path:
    worker.learn([bundle(digest)])
    if (unpacking := worker.unpacking(digest)) is not None:
        await unpacking
    return Path(worker.path(digest))


async def forget(worker: Bundles, digest: str = DIGEST) -> None:
    worker.retire([digest, "sha256:never had"])
    worker.drop_unused(lambda path: False)
    await asyncio.gather(*worker._dropping)


def is_whole(folder: Path) -> bool:
    return (folder / "shared_module.py").read_text() == "VALUE = 1"


def test_a_bundle_is_deleted_by_the_last_worker_that_has_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        first, second = Bundles(str(tmp_path)), Bundles(str(tmp_path))
        folder = await learn(first)
        assert await learn(second) == folder
        await forget(first)
        assert is_whole(folder)
        assert (first.known, second.known) == (set(), {DIGEST})
        await learn(first)
        await forget(second)
        assert is_whole(folder)
        await forget(first)
        assert list(folder.parent.iterdir()) == []
        assert is_whole(await learn(second)), "it comes again"
        second.close()
        assert list(folder.parent.iterdir()) == []

    play(scenario)


def test_a_bundle_stays_while_something_uses_it_or_it_is_sent_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        worker = Bundles(str(tmp_path))
        folder = await learn(worker)
        worker.need(str(folder))
        await forget(worker)
        worker.drop_unused(lambda path: path == str(folder))
        assert is_whole(folder), "a process is started for it"
        worker.release(str(folder))
        worker.drop_unused(lambda path: path == str(folder))
        assert is_whole(folder), "a process has it"
        await learn(worker)
        worker.drop_unused(lambda path: False)
        assert is_whole(folder), "it is not to be forgotten any more"
        await forget(worker)
        assert not folder.exists()

    play(scenario)


def test_bundles_of_killed_workers_are_deleted_and_those_of_others_are_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        other, worker = Bundles(str(tmp_path)), Bundles(str(tmp_path))
        worker.sweep()
        folder = await learn(other)
        left = [folder.parent / name for name in ("left", "half-unpacked", "new-one")]
        for path in left:
            path.mkdir()
            (path / "module.py").write_text("")
        old = time.time() - NEW_S - 1
        os.utime(left[1], (old, old))
        worker.sweep()
        assert [path.exists() for path in left] == [False, False, True]
        assert is_whole(folder)

    play(scenario)


def test_a_bundle_is_whole_when_several_workers_unpack_and_delete_it(tmp_path: Path) -> None:
    async def work(seed: int) -> None:
        rng, worker = random.Random(seed), Bundles(str(tmp_path))
        for _ in range(60):
            digest = rng.choice(["sha256:a", "sha256:b"])
            if digest in worker.known and rng.random() < 0.6:
                await forget(worker, digest)
            else:
                folder = await learn(worker, digest)
                assert is_whole(folder)
            for known in worker.known:
                assert is_whole(Path(worker.path(known)))
            if rng.random() < 0.2:
                await asyncio.to_thread(worker.sweep)
        worker.close()

    async def scenario() -> None:
        await asyncio.gather(*map(work, range(4)))
        assert list((tmp_path / "bundles").iterdir()) == []

    play(scenario)


def import_and_wait(gate: str) -> tuple[int, int]:
    import os

    import shared_module  # type: ignore[import-not-found]

    with open(gate, "rb", buffering=0) as file:
        file.read(1)
    return shared_module.VALUE, os.getpid()


@pytest.mark.slow
def test_a_process_that_has_a_forgotten_bundle_ends_its_call_and_then_itself(tmp_path: Path) -> None:
    gate = Gate(tmp_path, "only")
    store = tmp_path / "store"
    (store / "spares").mkdir(parents=True)
    function = type(import_and_wait)(import_and_wait.__code__, {"__builtins__": __builtins__}, "f")

    async def scenario(both: Pair) -> None:
        stream = both.stream
        first = stream.assign("a", function, inputs={"gate": gate.path})
        code = stream.code[first.function_digest]
        await stream.end("a")  # the module is missing
        code.bundle_digest = DIGEST
        code.digest = first.function_digest = "sha256:with a bundle"
        folder = store / "bundles" / "abc"

        def call(name: str, *, with_code: bool) -> None:
            sent = {"functions": [code], "bundles": [bundle()]} if with_code else {}
            stream.say(assignments=[lease_of(first, name)], **sent)
            gate.open()

        call("b", with_code=True)
        value, before = await stream.value("b")
        assert value == 1
        call("c", with_code=False)
        assert await stream.value("c") == (1, before), "it is used again"
        stream.say(assignments=[lease_of(first, "d")])
        await stream.until("d", "started")
        stream.say(forget_digests=[code.digest, DIGEST])
        call("e", with_code=True)
        gate.open()
        ends = {report.lease_id: report for report in [await stream.end("d"), await stream.end("e")]}
        assert {report.WhichOneof("fact") for report in ends.values()} == {"succeeded"}
        stream.say(forget_digests=[code.digest, DIGEST])
        while folder.exists():
            await asyncio.sleep(0.01)
        assert not Path(f"/proc/{before}/cwd").exists()

    async def scene() -> None:
        async with pair(store) as both, asyncio.timeout(TIMEOUT_S):
            await scenario(both)

    try:
        asyncio.run(scene())
    finally:
        gate.open(100)
        gate.close()


def lease_of(first: worker_pb2.Assignment, name: str) -> worker_pb2.Assignment:
    lease = worker_pb2.Assignment.FromString(first.SerializeToString())
    lease.lease_id = name
    return lease
