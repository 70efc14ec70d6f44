"""A PostgreSQL server of the tests' own: a cluster in a temporary folder, reached by a socket in it."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path

import psycopg
import pytest

# PostgreSQL refuses to run as root.
USERS = ("postgres", "nobody")


def program(name: str) -> str:
    """Return where a program of PostgreSQL is."""
    found = shutil.which(name) or next(iter(sorted(glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True)), "")
    if not found:
        pytest.skip("there is no PostgreSQL; `make postgres` installs it")
    return found


class PostgresServer:
    """A server over a cluster in a folder. `database` is its connection string, `url` the same as a URL.

    It dies with the process of the test.
    """

    def __init__(self, folder: Path, prefix: Sequence[str]) -> None:
        self.database = f"host={folder} user=lattice dbname=postgres"
        self.url = f"postgresql:///postgres?host={folder}&user=lattice"
        self._folder = folder
        self._prefix = prefix
        self._process: subprocess.Popen[bytes] | None = None

    def create(self) -> None:
        """Make the cluster."""
        command = (program("initdb"), "--pgdata", f"{self._folder}/data", "--username", "lattice", "--auth", "trust")
        done = subprocess.run(
            [*self._prefix, *command, "--no-sync"], cwd=self._folder, capture_output=True, timeout=100, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        """Start the server, and wait until it can be reached."""
        options = ("listen_addresses=", f"unix_socket_directories={self._folder}", "fsync=off", "shared_buffers=16MB")
        command = [program("postgres"), "-D", f"{self._folder}/data", *(f"--{option}" for option in options)]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen([*self._prefix, *command], cwd=self._folder, stdout=log, stderr=log)
        deadline = time.monotonic() + 60.0
        while True:
            try:
                psycopg.connect(self.database).close()
            except psycopg.OperationalError:
                is_starting = self._process.poll() is None and time.monotonic() < deadline
                assert is_starting, (self._folder / "log").read_text()
                time.sleep(0.02)
            else:
                return

    def stop(self) -> None:
        """Stop the server at once, as a crash would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(60)
            self._process = None


@contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """Yield a new server, which is stopped in the end."""
    folder = Path(tempfile.mkdtemp(prefix="lattice-pg-"))
    prefix = ["setpriv", "--pdeathsig", "QUIT"]
    if os.geteuid() == 0:
        account = pwd.getpwnam(next(name for name in USERS if _is_user(name)))
        os.chown(folder, account.pw_uid, account.pw_gid)
        prefix += ["--reuid", str(account.pw_uid), "--regid", str(account.pw_gid), "--clear-groups"]
    server = PostgresServer(folder, prefix)
    try:
        server.create()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _is_user(name: str) -> bool:
    try:
        return bool(pwd.getpwnam(name))
    except KeyError:
        return False
