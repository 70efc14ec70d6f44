"""A network of hosts on this machine: namespaces joined by a switch, each with an address and a cable of its own.

Rule: nothing outside the namespaces is touched, and they go with all that was started in them.
"""

import contextlib
import fcntl
import itertools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest

from tests.commands import START

# Namespaces are root's to make.
needs_network = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and iproute2")
START_S = 120.0
NUMBERS = itertools.count(1)
GONE_S = 120.0


@contextlib.contextmanager
def starting(executor: str) -> Iterator[None]:
    """Have no two Rays start at once, in whichever process of the suite: Ray gives a start up that takes 30 s."""
    descriptor = os.open(Path(__file__).parent, os.O_RDONLY)
    try:
        if executor == "ray":
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def ip(*words: str) -> None:
    """Run `ip`; an error says why."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


class Host:
    """One host. Its output goes to a file that `said` reads."""

    def __init__(self, namespace: str, switch: str, port: str, address: str, folder: Path) -> None:
        self.address = address
        self._namespace, self._switch, self._port = namespace, switch, port
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a program on the host."""
        log = self._folder / f"{self._namespace}-{len(self._processes)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                self._on_host(command),
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._processes.append(process)
        return process

    def lattice(self, *flags: str, env: Mapping[str, str] | None = None, until: str = "") -> subprocess.Popen[bytes]:
        """Start a server or a worker on the host, and wait until it has printed a text."""
        process = self.start(*START, *flags, env=env)
        if until:
            self.hear(process, until)
        return process

    def run(self, *command: str, env: Mapping[str, str] | None = None, timeout_s: float = 60.0) -> str:
        """Run a program on the host to its end; return its output."""
        done = subprocess.run(
            self._on_host(command),
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _on_host(self, command: tuple[str, ...]) -> list[str]:
        own = self._folder / f"{self._namespace}-ray"
        own.mkdir(exist_ok=True)
        shared = Path(tempfile.gettempdir(), "ray")
        shared.mkdir(exist_ok=True)
        # Ray nodes of one cluster quarrel over the names of sockets in a folder that machines do not share.
        script = 'mount --bind "$0" "$1" && shift && exec "$@"'
        return ["ip", "netns", "exec", self._namespace, "sh", "-c", script, str(own), str(shared), *command]

    def said(self, process: subprocess.Popen[bytes]) -> str:
        """Return the output of a program so far."""
        number = self._processes.index(process)
        return (self._folder / f"{self._namespace}-{number}.log").read_text()

    def hear(self, process: subprocess.Popen[bytes], text: str) -> str:
        """Wait until a program has printed a text; return the line it is in."""
        # `tail` waits for the file to grow, and ends with the program.
        number = self._processes.index(process)
        log = str(self._folder / f"{self._namespace}-{number}.log")
        tail = ["tail", "-n", "+1", "-s", "0.05", f"--pid={process.pid}", "-f", log]
        with subprocess.Popen(tail, stdout=subprocess.PIPE, text=True) as following:
            assert following.stdout is not None
            watchdog = signal_after(START_S, following)
            try:
                for line in following.stdout:
                    if text in line:
                        return line
            finally:
                watchdog.cancel()
                following.kill()
        raise AssertionError(f"{text!r} was not said, but: {self.said(process)}")

    def processes(self) -> list[psutil.Process]:
        """Return all processes of the host."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self._namespace], capture_output=True, text=True, check=False
        ).stdout
        found = []
        for pid in listed.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def crash(self) -> None:
        """Kill everything on the host at once, as a power cut would, its cable first."""
        self.cut()
        self.kill_all()
        self.mend()

    def kill_all(self) -> None:
        """Kill everything on the host."""
        while found := self.processes():
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            for started in self._processes:
                started.poll()
            psutil.wait_procs(found, timeout=GONE_S)

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to everything on the host."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def cut(self) -> None:
        """Cut the cable."""
        ip("-n", self._switch, "link", "set", self._port, "down")

    def mend(self) -> None:
        """Mend the cable."""
        ip("-n", self._switch, "link", "set", self._port, "up")

    @contextlib.contextmanager
    def strangers_to(self, other: "Host") -> Iterator[None]:
        """Have this host and another not reach each other while the block runs; all others reach both."""
        ip("-n", self._namespace, "route", "add", "blackhole", f"{other.address}/32")
        try:
            yield
        finally:
            ip("-n", self._namespace, "route", "delete", "blackhole", f"{other.address}/32")

    def carried_bytes(self) -> int:
        """Return how many bytes have gone over its cable, either way."""
        folder = "/sys/class/net/cable/statistics"
        return sum(map(int, self.run("cat", f"{folder}/rx_bytes", f"{folder}/tx_bytes").split()))

    def sent_bytes(self, port: int) -> int:
        """Return how many bytes a server on the host has sent to those who are connected."""
        told = self.run("ss", "-tniO", "state", "established", f"sport = :{port}")
        return sum(map(int, re.findall(r"bytes_sent:(\d+)", told)))

    def listening(self) -> list[str]:
        """Return the addresses on which anything listens, `address:port`."""
        return re.findall(r"LISTEN\s+\d+\s+\d+\s+(\S+)", self.run("ss", "-ltn"))

    def close(self) -> None:
        """End all that was started, the host included."""
        self.kill_all()
        for process in self._processes:
            process.wait(GONE_S)
        ip("netns", "delete", self._namespace)


@contextlib.contextmanager
def network(count: int, folder: Path) -> Iterator[list[Host]]:
    """Hosts that reach each other while the block runs."""
    prefix = f"lattice{os.getpid()}-{next(NUMBERS)}"
    switch = f"{prefix}-switch"
    ip("netns", "add", switch)
    hosts: list[Host] = []
    try:
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for number in range(1, count + 1):
            namespace, port, address = f"{prefix}-{number}", f"port{number}", f"10.77.0.{number}"
            ip("netns", "add", namespace)
            hosts.append(Host(namespace, switch, port, address, folder))
            ip("-n", namespace, "link", "add", "cable", "type", "veth", "peer", "name", port, "netns", switch)
            ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", namespace, "link", "set", "cable", "up")
            ip("-n", namespace, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts:
            host.close()
        ip("netns", "delete", switch)


def signal_after(seconds: float, process: "subprocess.Popen[str]") -> threading.Timer:
    """Kill a process after a time, unless the timer returned is cancelled."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    return timer
