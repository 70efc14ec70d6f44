"""How uploads are counted while they arrive, wait, and are needed."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lattice_server.core.errors import ExhaustedError
from lattice_server.core.model import Artifact
from lattice_server.engine.stores.artifact_files import UPLOADS
from lattice_server.engine.stores.artifact_store import ArtifactStore
from lattice_server.engine.stores.uploads import Uploads
from lattice_server.engine.stores.usage import Bound

X, Y = Artifact("x" * 64, 10, "head"), Artifact("y" * 64, 20, "head")


def test_an_upload_counts_until_nothing_waits_for_it_or_needs_it() -> None:
    async def scenario() -> None:
        dropped: list[Artifact] = []
        uploads = Uploads(Bound(100, share=0.5), 60.0, lambda artifact, tenant: dropped.append(artifact))
        uploads.receive("a", 10)
        uploads.forget("a", 10)
        uploads.wait("a", X)
        uploads.wait("a", X)
        assert uploads.usage.of("a") == 10, "equal uploads count once"
        first, named = uploads.take("a", [X, X, Y])
        assert named == [X], "one of two waits no longer, and Y was not uploaded"
        second, named = uploads.take("a", [X])
        assert named == [X]
        assert uploads.take("a", [X])[1] == []
        for names in (first, second, [("a", X.artifact_id)]):
            assert uploads.usage.of("a") == 10
            uploads.release(names)
        assert uploads.usage.total == 0
        assert dropped == []
        assert uploads.take("a", [X]) == ([], []), "it is an upload no more"

    asyncio.run(scenario())


def test_an_upload_counts_for_the_tenant_that_made_it_and_no_other_takes_it() -> None:
    async def scenario() -> None:
        uploads = Uploads(Bound(100), 60.0, lambda artifact, tenant: None)
        uploads.wait("a", X)
        assert uploads.take("b", [X]) == ([], [])
        uploads.wait("b", X)
        held, named = uploads.take("b", [X])
        assert (held, named) == ([("b", X.artifact_id)], [X])
        assert (uploads.usage.of("a"), uploads.usage.of("b")) == (10, 10)
        uploads.release(held)
        assert (uploads.usage.of("a"), uploads.usage.of("b")) == (10, 0)

    asyncio.run(scenario())


def test_an_upload_over_the_bound_is_refused_while_it_arrives_and_leaves_nothing(tmp_path: Path) -> None:
    async def scenario(store: ArtifactStore) -> None:
        store.uploads.usage.bound = Bound(100, share=0.5)
        sent: list[int] = []

        async def chunks(number: int) -> AsyncIterator[bytes]:
            for index in range(number):
                sent.append(index)
                yield bytes([index]) * 10

        kept = await store.write(chunks(3), "a")
        with pytest.raises(ExhaustedError) as caught:
            await store.write(chunks(9), "a")
        assert caught.value.reason == "STORE_FULL"
        assert caught.value.metadata == {"store": "uploads", "kept_bytes": "50", "limit_bytes": "50"}
        assert sent[3:] == [0, 1, 2], "the rest is not read"
        assert store.uploads.usage.total == kept.size_bytes
        await store.write(chunks(4), "b")
        kept_bytes = sorted(path.stat().st_size for path in store.directory.iterdir() if len(path.name) == 64)
        assert kept_bytes == [30, 40]
        assert list((store.directory / UPLOADS).iterdir()) == []

    store = ArtifactStore(str(tmp_path))
    try:
        asyncio.run(scenario(store))
    finally:
        store.close()
