"""Programs whose tasks run on real workers: the modules they send, their `__main__`, and the texts of errors."""

import os
import subprocess
import sys
import textwrap
import zipapp
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.e2e.heads import Head

HELPER = "def double(x):\n    return 2 * x\n"
SCRIPT = """
from lattice_client import LatticeClient, task
from helper import double

@task
def work(x: int) -> int:
    return double(x)

if __name__ == "__main__":
    with LatticeClient() as client:
        print(client.run_task(work, {"x": 4}))
"""


def run(
    address: str, folder: Path, files: Mapping[str, str], *command: str, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Write a project, and run a program of it against the server."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))
    if "app.pyz" in command:
        zipapp.create_archive(folder / "app", folder / "app.pyz")
    environment = {**os.environ, "LATTICE_TARGET": address}
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=folder,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


PROGRAMS: dict[str, tuple[list[str], dict[str, str]]] = {
    "a module run by name": (
        ["-m", "pack.main"],
        {
            "pack/main.py": SCRIPT.replace("from helper", "from .helper"),
            "pack/helper.py": HELPER,
            "pack/__init__.py": "",
        },
    ),
    "standard input": (["-"], {"helper.py": HELPER}),
    "a zip application": (["app.pyz"], {"app/__main__.py": SCRIPT, "app/helper.py": HELPER}),
    "a module that shadows the standard library": (
        ["script.py"],
        {"script.py": SCRIPT.replace("from helper", "from secrets"), "secrets.py": HELPER},
    ),
    "a namespace package": (
        ["script.py"],
        {"script.py": SCRIPT.replace("from helper", "from deep.er.helper"), "deep/er/helper.py": HELPER},
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_brings_its_modules(address: str, tmp_path: Path, program: str) -> None:
    command, files = PROGRAMS[program]
    done = run(address, tmp_path, files, *command, stdin=SCRIPT if command == ["-"] else None)
    assert done.stdout == "{'result': 8}\n", done.stderr


def test_modules_are_unpacked_once_for_each_content(address: str, tmp_path: Path) -> None:
    script = """
        import os
        from lattice_client import LatticeClient
        import helper

        def place():
            return helper.__file__, os.stat(helper.__file__).st_ino, os.getpid()

        def again():
            return helper.__file__, os.stat(helper.__file__).st_ino, os.getpid()

        with LatticeClient() as client:
            found = [client.run_task(work, {})["result"] for work in (place, again) for _ in range(5)]
            print(*(len({result[part] for result in found}) for part in (0, 1)), found[0][0])
    """
    first, second = (run(address, tmp_path, {"script.py": script, "helper.py": HELPER}, "script.py") for _ in range(2))
    assert first.stdout.split()[:2] == ["1", "1"], first.stderr
    assert second.stdout == first.stdout
    changed = run(address, tmp_path, {"helper.py": "# other\n"}, "script.py")
    assert changed.stdout.split()[:2] == ["1", "1"]
    assert changed.stdout != first.stdout


def test_a_task_sees_its_script_as_main(address: str, tmp_path: Path) -> None:
    script = """
        from __future__ import annotations
        import asyncio, dataclasses, multiprocessing, pickle, typing
        from concurrent.futures import ProcessPoolExecutor
        from lattice_client import LatticeClient, task

        @dataclasses.dataclass
        class Leg:
            stop: str

        @dataclasses.dataclass
        class Trip:
            legs: list[Leg]

        def square(trip):
            return Trip([Leg(leg.stop * 2) for leg in trip.legs])

        @task
        def hints() -> list:
            return sorted(typing.get_type_hints(Trip))

        @task
        def pooled(method: str) -> str:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
                return list(pool.map(square, [Trip([Leg("a")])]))[0].legs[0].stop

        @task
        async def pickled() -> bool:
            await asyncio.sleep(0)
            return pickle.loads(pickle.dumps(Trip([]))) == Trip([])

        with LatticeClient() as client:
            print(client.run_task(hints, {}), client.run_task(pickled, {}))
            for method in ("fork", "spawn", "forkserver", "spawn"):
                print(client.run_task(pooled, {"method": method}))
            print(client.run_task(hints, {}))
    """
    done = run(address, tmp_path, {"script.py": script}, "script.py")
    pooled = "{'result': 'aa'}\n" * 4
    assert done.stdout == f"{{'result': ['legs']}} {{'result': True}}\n{pooled}{{'result': ['legs']}}\n", done.stderr


def test_scripts_whose_tasks_share_a_process_do_not_mix(address: str, tmp_path: Path) -> None:
    script = """
        import pickle
        from lattice_client import LatticeClient, task

        class Value:
            number = NUMBER

        @task
        def work() -> tuple:
            import __main__
            return __main__.Value.number, pickle.loads(pickle.dumps(Value())).number, type(Value()) is __main__.Value

        with LatticeClient() as client:
            print(client.run_task(work, {})["result"])
    """
    for number in (1, 2, 1, 2):
        done = run(address, tmp_path, {"script.py": script.replace("NUMBER", str(number))}, "script.py")
        assert done.stdout == f"({number}, {number}, True)\n", done.stderr


FAILING = """
import helper
from lattice_client import LatticeClient, task

@task{options}
def work() -> int:
    return helper.fail()  # the task

with LatticeClient() as client:
    client.run_task(work, {{}})
"""


def test_an_error_shows_file_line_and_source_of_script_and_helper(address: str, tmp_path: Path) -> None:
    files = {"script.py": FAILING.format(options=""), "helper.py": "def fail():\n    raise ValueError('no')\n"}
    done = run(address, tmp_path, files, "script.py")
    assert f'  File "{tmp_path}/script.py", line 7, in work\n    return helper.fail()  # the task\n' in done.stderr
    assert "  File \"helper.py\", line 2, in fail\n    raise ValueError('no')\n" in done.stderr


def test_an_error_says_why_a_module_was_not_sent(address: str, tmp_path: Path) -> None:
    files = {"script.py": FAILING.format(options="(exclude=['helper'])"), "helper.py": "def fail(): ...\n"}
    done = run(address, tmp_path, files, "script.py")
    assert "module 'helper' is left out by exclude=['helper']" in done.stderr
    files["helper.py"] = "def fail():\n    import helper_of_helper\n"
    files["script.py"] = FAILING.format(options="")
    done = run(address, tmp_path, files, "script.py")
    assert "module 'helper_of_helper' was not among the imports that the client found" in done.stderr


def test_a_bundle_is_sent_once_and_again_to_a_server_that_lacks_it(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from lattice_client import LatticeClient
        from lattice_client.convert import specs
        import helper

        sent = []
        fill = specs.fill_code

        def note(spec, *arguments):
            fill(spec, *arguments)
            sent.append(len(spec.bundles))

        specs.fill_code = note

        def other(number):
            def work(x):
                return helper.double(x) + number
            return work

        with LatticeClient() as client:
            for number in range(4):
                print(client.run_task(other(number), {"x": 4}), sent, flush=True)
                sent.clear()
                input()
    """
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    head = Head(tmp_path / "journal")
    head.start()
    environment = {**os.environ, "LATTICE_TARGET": head.address}
    command = [sys.executable, "script.py"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        try:
            for expected in ("{'result': 8} [1]", "{'result': 9} [0]", "{'result': 10} [0, 1]", "{'result': 11} [0]"):
                assert program.stdout.readline() == f"{expected}\n"
                if "9" in expected:
                    head.kill()
                    head.journal = tmp_path / "another"
                    head.start()
                program.stdin.write("\n")
                program.stdin.flush()
        finally:
            program.kill()
            head.close()


def test_classes_of_a_script_keep_their_qualified_names(address: str, tmp_path: Path) -> None:
    program = """
        import dataclasses, enum, pickle, typing
        from lattice_client import LatticeClient, context, task

        class Outer:
            class Busy(Exception): ...
            class Pair(typing.NamedTuple):
                x: int
            @dataclasses.dataclass(slots=True)
            class Point:
                x: int
            class Color(enum.Enum):
                RED = 1

        @task
        def names() -> list[str]:
            kinds = [Outer.Busy, Outer.Pair, Outer.Point, Outer.Color]
            assert pickle.loads(pickle.dumps(Outer.Point(1))) == Outer.Point(1)
            return [kind.__qualname__ for kind in kinds]

        def main(client: LatticeClient) -> None:
            class Local(Exception): ...

            for kind in (Outer.Busy, Local):
                @task(retries=2, retry_on=kind, retry_backoff=0)
                def flaky() -> int:
                    if context.current().number < 3:
                        raise kind
                    return context.current().number

                print(client.run_task(flaky, {})["result"])
            print(*client.run_task(names, {})["result"])

        with LatticeClient() as client:
            main(client)
        """
    ended = run(address, tmp_path, {"script.py": program}, "script.py")
    assert ended.stdout.split() == ["3", "3", "Outer.Busy", "Outer.Pair", "Outer.Point", "Outer.Color"], ended.stderr
