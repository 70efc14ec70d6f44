"""A PostgreSQL server of the tests' own: a cluster in a temporary folder, reached by a socket in it."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import pytest

# PostgreSQL refuses to run as root.
USERS = ("postgres", "nobody")


def program(name: str) -> str:
    """Return where a program of PostgreSQL is."""
    found = shutil.which(name) or next(iter(sorted(glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True)), "")
    if not found:
        pytest.skip("there is no PostgreSQL; `make postgres` installs it")
    return found


@dataclass
class PostgresServer:
    """A server: where it is reached, and how it is stopped at once and started again."""

    database: str
    stop: Callable[[], None]
    start: Callable[[], None]


@contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """Yield a new server, which is stopped then."""
    folder = Path(tempfile.mkdtemp(prefix="lattice-pg-"))
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        account = pwd.getpwnam(next(name for name in USERS if _is_user(name)))
        os.chown(folder, account.pw_uid, account.pw_gid)
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    data = folder / "data"

    def run(*command: str) -> None:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False, **user)
        assert done.returncode == 0, done.stdout + done.stderr

    try:
        run(program("initdb"), "--pgdata", str(data), "--username", "lattice", "--auth", "trust", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c fsync=off -c shared_buffers=16MB"
        control = (program("pg_ctl"), "--pgdata", str(data), "--wait")
        server = PostgresServer(
            f"host={folder} user=lattice dbname=postgres",
            lambda: run(*control, "--mode", "immediate", "stop"),
            lambda: run(*control, "--log", str(folder / "log"), "--options", options, "start"),
        )
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_user(name: str) -> bool:
    try:
        return bool(pwd.getpwnam(name))
    except KeyError:
        return False
