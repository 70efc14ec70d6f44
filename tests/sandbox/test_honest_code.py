"""Ordinary code works in a sandbox: each function is called in one of its own, at each level."""

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lattice_worker.sandbox.policy import LEVELS, SECCOMP, policy_of
from tests.sandbox.boxes import in_box


def multiply_arrays() -> object:
    import numpy as np

    return int((np.ones((64, 64)) @ np.ones((64, 64))).sum())


def run_threads() -> object:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(abs, range(-10, 0)))


def run_programs() -> object:
    import subprocess
    import sys

    said = subprocess.run(["sh", "-c", "echo $HOME"], capture_output=True, text=True, check=True).stdout.strip()
    ran = subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True, check=True).stdout
    return [said == os.getcwd(), int(ran)]


def run_pool_of_processes() -> object:
    import multiprocessing

    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(abs, [-1, -2])


def start_processes_anew() -> object:
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map(abs, [-1, -2])


def share_memory() -> object:
    from multiprocessing.shared_memory import SharedMemory

    memory = SharedMemory(create=True, size=1000)
    memory.buf[999] = 7
    found = memory.buf[999]
    memory.close()
    memory.unlink()
    return found


def write_temporary_files() -> object:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(b"x")
        return Path(folder).parent == Path(os.environ["TMPDIR"])


def query_database() -> object:
    import sqlite3

    with sqlite3.connect("x.db") as database:
        database.execute("CREATE TABLE t (a)")
        database.execute("INSERT INTO t VALUES (3)")
        return database.execute("SELECT a FROM t").fetchone()[0]


def await_children() -> object:
    import asyncio

    async def main() -> bytes:
        process = await asyncio.create_subprocess_exec("echo", "hi", stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
        return out

    return asyncio.run(main()).decode()


def load_certificates() -> object:
    import ssl

    return ssl.create_default_context().verify_mode == ssl.CERT_REQUIRED


def know_user_and_place() -> object:
    import datetime
    import getpass
    import locale
    import pwd
    import time
    import zoneinfo

    named = getpass.getuser() == pwd.getpwuid(os.getuid()).pw_name
    winter = datetime.datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"))
    time.tzset()
    return [named, winter.utcoffset() == datetime.timedelta(hours=1), bool(locale.setlocale(locale.LC_ALL, "C"))]


def draw_random_numbers() -> object:
    return [len(os.urandom(8)), len(open("/dev/urandom", "rb").read(4)), open("/dev/zero", "rb").read(1) == b"\0"]


EXPECTED: list[tuple[Callable[[], object], object]] = [
    (multiply_arrays, 262144),
    (run_threads, 55),
    (run_programs, [True, 42]),
    (run_pool_of_processes, [1, 2]),
    (start_processes_anew, [1, 2]),
    (share_memory, 7),
    (write_temporary_files, True),
    (query_database, 3),
    (await_children, "hi\n"),
    (load_certificates, True),
    (know_user_and_place, [True, True, True]),
    (draw_random_numbers, [8, 4, True]),
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("function", "expected"), EXPECTED, ids=[function.__name__ for function, _ in EXPECTED])
def test_honest_code_works(level: str, function: Callable[[], object], expected: object, tmp_path: Path) -> None:
    assert in_box(policy_of(level), tmp_path, function) == expected


def test_clone3_is_unknown_and_threads_start_all_the_same(tmp_path: Path) -> None:
    def run() -> list[object]:
        libc = ctypes.CDLL(None, use_errno=True)
        return [libc.syscall(435, None, 0), ctypes.get_errno(), run_threads()]

    assert in_box(policy_of(SECCOMP), tmp_path, run) == [-1, errno.ENOSYS, 55]


@pytest.mark.parametrize("level", LEVELS)
def test_code_of_the_task_can_be_imported_and_not_changed(level: str, tmp_path: Path) -> None:
    bundle, boxes = tmp_path / "bundle", tmp_path / "boxes"
    bundle.mkdir()
    boxes.mkdir()
    (bundle / "helper_of_task.py").write_text("ANSWER = 42\n")

    def run(folder: str) -> list[object]:
        import sys

        sys.path.insert(0, folder)
        import helper_of_task  # type: ignore[import-not-found]

        try:
            Path(folder, "helper_of_task.py").write_text("")
        except OSError:
            return [helper_of_task.ANSWER, "refused"]
        return [helper_of_task.ANSWER, "changed"]

    found = in_box(policy_of(level, str(bundle)), boxes, run, str(bundle))
    assert found == [42, "refused"]
