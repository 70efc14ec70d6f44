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
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from typing import IO

from lattice_worker.containers.config import EngineConfig
from lattice_worker.containers.digest import source_digest
from lattice_worker.containers.engine import Engine, EngineError
from lattice_worker.containers.rootfs import PYTHON, RUNNER_PACKAGES, Rootfs, machine_digest, with_needed
from lattice_worker.containers.spec import UID

# Two images, because the first one is large and changes seldom.
MACHINE = """\
FROM scratch
COPY machine/ /
"""
RUNNER = f"""\
FROM {{base}}
COPY runner/ /
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
    try:
        asyncio.run(_build(config, flags.tag, flags.package))
    except PackageNotFoundError as error:
        sys.exit(f"this Python has no package {error.name!r}: install it first")
    except EngineError as error:
        sys.exit(str(error))
    print(f"built {flags.tag}")


async def _build(config: EngineConfig, tag: str, packages: list[str]) -> None:
    engine = await Engine.connect(config)
    try:
        needed, base = with_needed([*RUNNER_PACKAGES, *packages]), f"{tag}-base"
        digest = machine_digest(needed)
        if not await engine.has_image(base, digest):
            with tempfile.TemporaryFile() as file:
                _write(file, MACHINE, "machine", lambda rootfs: rootfs.write_machine(needed))
                await engine.build(file, base, digest)
        with tempfile.TemporaryFile() as file:
            _write(file, RUNNER.format(base=base), "runner", lambda rootfs: rootfs.write_runner())
            await engine.build(file, tag, source_digest())
    finally:
        await engine.close()


def _write(file: IO[bytes], dockerfile: str, folder: str, write: Callable[[Rootfs], None]) -> None:
    """Write the archive that the engine builds an image from."""
    with tarfile.open(fileobj=file, mode="w") as archive:
        Rootfs(archive, "").write_text("Dockerfile", dockerfile)
        write(Rootfs(archive, folder))
    file.seek(0)


if __name__ == "__main__":
    main()
