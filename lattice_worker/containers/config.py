"""The settings of the level `docker` on one machine, from the environment of the worker."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

IMAGE = "lattice-sandbox"
SOCKETS = ("/run/docker.sock", "/var/run/docker.sock")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Which engine and image containers are made with.

    Attributes:
        host: the address of the engine, `unix://PATH`; empty when there is none.
        image: the image, which `python -m lattice_worker.containers.image` builds.
        runtime: the engine's name of the runtime, such as `crun`; empty for its own choice.
    """

    host: str = ""
    image: str = IMAGE
    runtime: str = ""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "EngineConfig":
        """Return the settings that an environment names.

        `LATTICE_DOCKER_HOST`, then `DOCKER_HOST`, then the usual sockets name the engine. An empty
        `LATTICE_DOCKER_HOST` stands for none.
        """
        found = next((f"unix://{path}" for path in SOCKETS if os.path.exists(path)), "")
        return cls(
            environment.get("LATTICE_DOCKER_HOST", environment.get("DOCKER_HOST", found)),
            environment.get("LATTICE_DOCKER_IMAGE") or IMAGE,
            environment.get("LATTICE_DOCKER_RUNTIME", ""),
        )
