"""Builds the sandbox image: `python -m lattice_worker.containers.image [--package NAME]...`.

Rule: the image is made of this machine's own Python and packages alone, so that nothing is pulled and code that was
pickled here runs there.
"""

import argparse
import asyncio
import os
import sys
import tarfile
import tempfile
from importlib.metadata import PackageNotFoundError
from typing import IO

from lattice_worker.containers.config import EngineConfig
from lattice_worker.containers.digest import source_digest
from lattice_worker.containers.engine import Engine, EngineError
from lattice_worker.containers.rootfs import PYTHON, Rootfs
from lattice_worker.containers.spec import UID

DOCKERFILE = f"""\
FROM scratch
COPY rootfs/ /
ENV PATH=/opt/lattice/bin:/bin LANG=C.UTF-8
USER {UID}:{UID}
ENTRYPOINT ["{PYTHON}"]
"""


def main() -> None:
    """Build the image."""
    config = EngineConfig.of(os.environ)
    parser = argparse.ArgumentParser(prog="lattice_worker.containers.image", description="Build the sandbox image.")
    parser.add_argument("--tag", default=config.image)
    parser.add_argument("--package", action="append", default=[], help="with those it needs; may be given again")
    flags = parser.parse_args()
    with tempfile.TemporaryFile() as file:
        try:
            size_bytes = write_context(file, flags.package)
            asyncio.run(_build(config, flags.tag, file))
        except PackageNotFoundError as error:
            sys.exit(f"this Python has no package {error.name!r}: install it first")
        except EngineError as error:
            sys.exit(str(error))
    print(f"built {flags.tag}, {size_bytes / 1e6:.0f} MB")


def write_context(file: IO[bytes], packages: list[str]) -> int:
    """Write the archive that the engine builds the image from; return its size. Raises PackageNotFoundError."""
    with tarfile.open(fileobj=file, mode="w") as archive:
        Rootfs(archive, "").write_text("Dockerfile", DOCKERFILE)
        Rootfs(archive, "rootfs").write(packages)
    size_bytes = file.tell()
    file.seek(0)
    return size_bytes


async def _build(config: EngineConfig, tag: str, file: IO[bytes]) -> None:
    engine = await Engine.connect(config)
    try:
        await engine.build(file, tag, source_digest())
    finally:
        await engine.close()


if __name__ == "__main__":
    main()
