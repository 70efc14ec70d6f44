"""The process that is Ray's driver: `python -m lattice_server.executors.ray_driver`.

It reads orders from stdin and writes events to stdout, a JSON object a line; see `ray_child`. Only this process and its
actors import Ray. Rule: it ends when the server does, and when the Ray it started does.
"""

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
from typing import Any, BinaryIO
from unittest import mock

import ray
import ray._private.services
import ray._private.worker
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from lattice_server import background
from lattice_server.executors.processes import end_session
from lattice_server.executors.ray_actor import WorkerHost
from lattice_server.executors.ray_transfer import host_name

PR_SET_PDEATHSIG = 1
LINE_LIMIT_BYTES = 1024 * 1024
WATCHED = ("gcs_server", "raylet")
MAX_REASON = 500
CALLS = 8  # Of a host at a time: one that lasts as long as its worker, and those of other hosts that read.


class Driver:
    """Carries out the server's orders. Everything runs on the main thread's event loop."""

    def __init__(self, orders: BinaryIO, messages: BinaryIO) -> None:
        self._orders = orders
        self._messages = messages
        self._groups: dict[str, PlacementGroup] = {}
        self._hosts: dict[str, Any] = {}
        self._serving: dict[str, asyncio.Task[None]] = {}

    def start_ray(self, order: dict[str, Any]) -> None:
        """Start a Ray, or join one. Raises whatever Ray raises."""
        settings: dict[str, Any] = {"address": order["address"]}
        if order["address"] == "local":
            settings |= {
                "num_cpus": order["num_cpus"],
                "num_gpus": order["num_gpus"],
                "resources": order["resources"],
                "include_dashboard": False,
                "_node_ip_address": order["node_ip"],
                "_temp_dir": order["temp_dir"],
                # They are not read here, and every node would serve them on all interfaces.
                "_system_config": {"enable_metrics_collection": False},
            }
        # Ray replaces the loopback address by one of this machine's network, and then listens on all interfaces.
        with mock.patch.object(ray._private.services, "resolve_ip_for_localhost", lambda host: host):
            ray.init(log_to_driver=False, logging_level=logging.WARNING, **settings)
        address = ray.get_runtime_context().gcs_address
        if order["address"] == "local" and not address.startswith(f"{order['node_ip']}:"):
            raise RuntimeError(f"Ray {ray.__version__} cannot be bound to {order['node_ip']}; use --executor local")
        total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        self.report("started", address=address, total=total)

    async def run(self, is_owner: bool) -> None:
        """Carry out orders until the server closes stdin."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=LINE_LIMIT_BYTES)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), self._orders)
        if is_owner:
            self._watch_processes()
        while line := await reader.readline():
            order = json.loads(line)
            match order["do"]:
                case "reserve":
                    self._groups[order["key"]] = placement_group([order["bundle"]], strategy="STRICT_PACK")
                case "serve":
                    self._serving[order["key"]] = background.start(self._serve(order), self._fail)
                case "release":
                    self._release(order["key"])

    async def _serve(self, order: dict[str, Any]) -> None:
        key, worker_id = order["key"], order["worker_id"]
        status = host = None
        try:
            # In a thread, because Ray's head is asked whether the name is free.
            host = self._hosts[key] = await asyncio.to_thread(_placed, order, self._groups[key])
            # It waits until Ray has room for the reservation; meanwhile Ray's autoscaler sees it.
            pid = await asyncio.wrap_future(host.pid.remote().future())
            self.report("placed", key=key, worker_id=worker_id, pid=pid)
            arguments = (order["flags"], order["target"], order["environment"], order["follows_node"])
            status = await asyncio.wrap_future(host.serve.remote(*arguments).future())
            reason = f"its process ended with status {status}"
        except ray.exceptions.RayError as error:
            reason = f"Ray lost its process: {str(error).splitlines()[0]}"
        except ValueError as error:
            reason = f"Ray still has the one before it: {error}"
        if host is not None:
            ray.kill(host)
        self.report("ended", key=key, worker_id=worker_id, status=status, reason=reason)

    def _release(self, key: str) -> None:
        if serving := self._serving.pop(key, None):
            serving.cancel()
        if host := self._hosts.pop(key, None):
            ray.kill(host)
        if group := self._groups.pop(key, None):
            remove_placement_group(group)

    def _fail(self, error: BaseException) -> None:
        self._end(f"Ray failed: {error}")

    def _watch_processes(self) -> None:
        """End at once when Ray does: without its head a driver is ended from within, sooner or later."""
        node: Any = ray._private.worker._global_node
        for name in WATCHED:
            for info in node.all_processes.get(name, []):
                descriptor = os.pidfd_open(info.process.pid)
                asyncio.get_running_loop().add_reader(descriptor, self._end, f"Ray's {name} ended")

    def _end(self, reason: str) -> None:
        self.report("over", reason=reason)
        # A normal exit would wait for Ray, which is gone.
        os._exit(1)

    def report(self, event: str, **details: Any) -> None:
        """Tell the server that something happened."""
        with contextlib.suppress(BrokenPipeError):
            self._messages.write(json.dumps({"event": event, **details}).encode() + b"\n")


def _placed(order: dict[str, Any], group: PlacementGroup) -> Any:
    """Have Ray place a host, whenever it has room for it. Raises ValueError when its name is taken."""
    return (
        ray.remote(WorkerHost)
        .options(
            name=host_name(order["store"]),
            max_concurrency=CALLS,
            num_cpus=order["bundle"].get("CPU", 0),
            num_gpus=order["bundle"].get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
        )
        .remote()
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:MAX_REASON] or type(error).__name__


def main() -> None:
    """Be Ray's driver until the server closes stdin or is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(os.environ["LATTICE_PARENT_PID"]):
        sys.exit("the server is gone")
    # Ray and its processes may write to stdout, so the messages go to a copy.
    orders = os.fdopen(os.dup(0), "rb", buffering=0)
    messages = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    driver = Driver(orders, messages)
    first = json.loads(orders.readline())
    try:
        # On the main thread: what Ray starts ends with the thread that started it.
        driver.start_ray(first)
    except Exception as error:
        driver.report("over", reason=f"Ray did not start: {_one_line(error)}")
        sys.exit(1)
    # From here on the driver stops at the end of stdin; the signal that comes with it would interrupt the cleanup.
    signal.signal(signal.SIGTERM, lambda *_: None)
    asyncio.run(driver.run(first["address"] == "local"))
    ray.shutdown()
    # Its agents would look for it for another minute.
    end_session(os.getpid())


if __name__ == "__main__":
    main()
