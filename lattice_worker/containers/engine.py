"""The connection to a container engine, Docker's or one that speaks its protocol. The only importer of aiodocker.

Rule: every failure is an EngineError that says what to do about it.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from lattice_worker import background
from lattice_worker.containers.config import EngineConfig

DIGEST = "lattice.source"  # The label of an image that names the code in it.
REQUEST_S = 60.0
BUILD = "build it on this machine by `python -m lattice_worker.containers.image`"


class EngineError(Exception):
    """The engine cannot be reached, or a request to it failed."""


class Engine:
    """One connection. Call `listen` before starting the containers whose events it reports."""

    def __init__(self, docker: Any, config: EngineConfig) -> None:
        self._docker = docker
        self._config = config
        self._listening: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, config: EngineConfig) -> "Engine":
        """Connect to the engine. Raises EngineError."""
        if not config.host:
            raise EngineError("there is no container engine: no socket of Docker at /run/docker.sock, and none is set")
        try:
            import aiodocker
            import aiohttp
        except ImportError:
            text = "aiodocker is not installed: pip install 'lattice-control-plane[docker]'"
            raise EngineError(text) from None
        try:
            docker = aiodocker.Docker(config.host, timeout=aiohttp.ClientTimeout(total=REQUEST_S))
        except ValueError as error:
            raise EngineError(f"{config.host} is no address of a container engine: {error}") from None
        engine = cls(docker, config)
        try:
            with _errors(f"the container engine at {config.host}"):
                await docker.version()
        except EngineError:
            await engine.close()
            raise
        return engine

    async def close(self) -> None:
        """Close the connection."""
        if self._listening is not None:
            self._listening.cancel()
        # An engine that ended first left its last answer unfinished.
        with contextlib.suppress(Exception):
            await self._docker.close()

    async def build(self, context: IO[bytes], tag: str, digest: str) -> None:
        """Build an image from an archive with a Dockerfile. Raises EngineError."""
        with _errors(f"the image {tag} could not be built"):
            await self._docker.images.build(
                fileobj=context, encoding="identity", tag=tag, rm=True, forcerm=True, labels={DIGEST: digest}
            )

    async def require_image(self, digest: str) -> None:
        """Raise EngineError unless the image is here and was built from this code."""
        image = self._config.image
        if not await self.has_image(image, digest):
            raise EngineError(f"the image {image} is not there, or has other code than this worker: {BUILD}")

    async def has_image(self, image: str, digest: str) -> bool:
        """Whether there is an image that was built from something. Raises EngineError."""
        found: dict[str, Any] = {}
        with _errors(f"the image {image}", {404: ""}):
            found = await self._docker.images.inspect(image)
        return bool(found) and (found["Config"].get("Labels") or {}).get(DIGEST) == digest

    async def create(self, name: str, body: Mapping[str, Any]) -> str:
        """Create a container and return its id. Raises EngineError."""
        with _errors("a container could not be created"):
            container = await self._docker.containers.create({**body, "Image": self._config.image}, name=name)
        return str(container.id)

    async def start(self, container_id: str) -> None:
        """Start a container. Raises EngineError."""
        with _errors("a container could not be started"):
            await self._docker.containers.container(container_id).start()

    async def remove(self, container_id: str) -> None:
        """Kill a container and remove it, unless that is done or under way. Raises EngineError."""
        with _errors(f"container {container_id[:12]} could not be removed", {404: "", 409: ""}):
            await self._docker.containers.container(container_id).delete(force=True, v=True)

    async def labelled(self, label: str) -> dict[str, str]:
        """Return the containers that have a label, and its value for each. Raises EngineError."""
        with _errors("the containers could not be listed"):
            filters = json.dumps({"label": [label]})
            found = await self._docker._query_json("containers/json", params={"all": "1", "filters": filters})
        return {each["Id"]: each["Labels"][label] for each in found}

    def listen(self, label: str, value: str, on_event: Callable[[str, str, dict[str, str]], None]) -> None:
        """Call with the name, the container id and the attributes of each event of containers with a label.

        The name of the event is empty once the engine says no more.
        """
        listening = self._listen(f"{label}={value}", on_event)
        self._listening = background.start(listening, lambda _: on_event("", "", {}))

    async def _listen(self, label: str, on_event: Callable[[str, str, dict[str, str]], None]) -> None:
        filters = {"type": ["container"], "label": [label], "event": ["oom", "die", "destroy"]}
        # From now, also when the engine takes the request later.
        params = {"filters": json.dumps(filters), "since": f"{time.time():.6f}"}
        subscriber = self._docker.events.subscribe(**params)
        with contextlib.suppress(Exception):
            while (event := await subscriber.get()) is not None:
                on_event(event["Action"], event["Actor"]["ID"], event["Actor"]["Attributes"])
        on_event("", "", {})


@contextlib.contextmanager
def _errors(what: str, known: Mapping[int, str] | None = None) -> Iterator[None]:
    """Turn errors of the engine into EngineError. Those of `known` status codes get a text; an empty one is none."""
    import aiodocker
    import aiohttp

    try:
        yield
    except aiodocker.DockerError as error:
        text = (known or {}).get(error.status, error.message)
        if text:
            raise EngineError(f"{what}: {text}") from None
    except (OSError, TimeoutError, aiohttp.ClientError) as error:
        raise EngineError(f"{what}: {type(error).__name__}: {error}") from None
