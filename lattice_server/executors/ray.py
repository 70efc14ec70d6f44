"""Has Ray place and start the worker. Rule: Ray reserves, places and starts; attempts travel over the worker's stream.

The worker runs inside a placement group's bundle that holds all it offers, so Ray's own books stay true.
"""

import asyncio
import contextlib
import logging
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock
from uuid import uuid4

import ray
import ray._private.services
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lattice_server.config import ServerConfig
from lattice_server.core.messages import SchedulerEvent, WorkerLost
from lattice_server.engine.ports import Contact, Machine, Membership
from lattice_server.executors.command import worker_command
from lattice_server.executors.leftovers import MARK, end_leftovers

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
RESERVE_S = 60.0
LEAVE_S = 5.0
RESTART_S = 0.2


class WorkerHost:
    """The actor Ray places; it holds the reservation for as long as the worker lives."""

    def serve(self, command: list[str], environment: dict[str, str]) -> int:
        """Run a worker as a child of this actor and return its exit status."""
        # The worker ends with the actor, whichever way the actor ends.
        environment = {**os.environ, **environment, "LATTICE_PARENT_PID": str(os.getpid())}
        status = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL).wait()
        end_leftovers(environment[MARK])
        return status


class RayExecutor:
    """Starts Ray on this machine, reserves its CPUs and GPUs, and keeps one worker alive in the reservation."""

    name = "ray"

    def __init__(self, config: ServerConfig, store_directory: Path) -> None:
        self._config = config
        self._store_directory = store_directory
        self._group: PlacementGroup | None = None
        self._address = ""
        self._keeper: asyncio.Task[None] | None = None
        self._left = asyncio.Event()
        self._is_stopping = False

    async def start(self, contact: Contact, post: Callable[[Sequence[SchedulerEvent]], None]) -> None:
        """Start Ray, reserve, and start the worker, again whenever it dies."""
        bundle = await asyncio.to_thread(self._reserve)
        offered = replace(self._config, num_cpus=bundle["CPU"], num_gpus=int(bundle.get("GPU", 0)))
        self._keeper = asyncio.create_task(self._keep(offered, contact, post))

    async def stop(self) -> None:
        """End the worker and the Ray this executor started."""
        self._is_stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                await self._left.wait()
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        await asyncio.to_thread(ray.shutdown)

    def ray_address(self) -> str:
        """Return where Ray's head listens."""
        return self._address

    async def join(self, machine: Machine) -> Membership:
        """Let the machine serve its node itself."""
        return Membership(None, asyncio.get_running_loop().create_future())

    def leave(self, node_id: str) -> None:
        """Do nothing: the worker's own stream tells."""

    def _reserve(self) -> dict[str, float]:
        # Ray takes the loopback address for a mistake, puts one of this machine's network in its place, and then
        # listens to everybody.
        with mock.patch.object(ray._private.services, "resolve_ip_for_localhost", lambda host: host):
            ray.init(
                # Never a stranger's cluster that happens to run here.
                address="local",
                num_cpus=None if self._config.num_cpus is None else max(1, int(self._config.num_cpus)),
                num_gpus=self._config.num_gpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                _node_ip_address=LOOPBACK,
            )
        if not ray.get_runtime_context().gcs_address.startswith(f"{LOOPBACK}:"):
            ray.shutdown()
            raise RuntimeError(f"Ray {ray.__version__} cannot be bound to loopback; use --executor local")
        self._address = ray.get_runtime_context().gcs_address
        total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        bundle = {name: total[name] for name in ("CPU", "GPU") if total.get(name)}
        self._group = placement_group([bundle], strategy="STRICT_PACK")
        ray.get(self._group.ready(), timeout=RESERVE_S)
        return bundle

    async def _keep(
        self,
        config: ServerConfig,
        contact: Contact,
        post: Callable[[Sequence[SchedulerEvent]], None],
    ) -> None:
        group = self._group
        assert group is not None, "reserved before"
        while True:
            worker_id = f"ray-{uuid4().hex[:12]}"
            command = worker_command(
                config,
                target=contact.local_target,
                worker_id=worker_id,
                node_id="ray-head",
                store_directory=self._store_directory,
            )
            host = (
                ray.remote(WorkerHost)
                .options(
                    num_cpus=config.num_cpus,
                    num_gpus=config.num_gpus,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
                )
                .remote()
            )
            self._left.clear()
            reference = host.serve.remote(command, {MARK: worker_id})  # type: ignore[attr-defined]
            try:
                status = await asyncio.wrap_future(reference.future())
                reason = f"its process ended with status {status}"
            except ray.exceptions.RayError as error:
                reason = f"Ray lost its process: {error}"
            self._left.set()
            if self._is_stopping:
                return
            log.warning("worker %s is gone: %s; starting another", worker_id, reason)
            post([WorkerLost(worker_id, reason)])
            # A worker that cannot even start must not be started in a tight loop.
            await asyncio.sleep(RESTART_S)
