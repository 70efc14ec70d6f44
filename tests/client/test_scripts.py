"""The script of a function in another process: `__main__`, source lines, and objects of all types."""

import textwrap
import zipapp
from pathlib import Path

import pytest

from tests.client.kinds import KINDS
from tests.client.travel import Travel

pytestmark = pytest.mark.slow


@pytest.fixture
def travel(tmp_path: Path) -> Travel:
    """A project and a machine that does not have it."""
    return Travel(tmp_path)


def written(travel: Travel, body: str) -> None:
    """Write a script that sends its function `work`."""
    travel.write(
        {"script.py": f"{textwrap.dedent(body)}\nfrom sender import send\nif __name__ == '__main__': send(work)\n"}
    )


def test_type_hints_of_the_script_are_found(travel: Travel) -> None:
    written(
        travel,
        """
        from __future__ import annotations
        import dataclasses, typing
        import fancy

        @dataclasses.dataclass
        class Leg:
            stop: Stop
            way: typing.Literal["rail", "road"]

        class Stop:
            name: str
            back: typing.Optional[Trip]

        @dataclasses.dataclass
        class Trip:
            legs: list[Leg]

        class Plan(typing.TypedDict):
            trip: Trip

        def work() -> Plan | None:
            hints = [typing.get_type_hints(found) for found in (Trip, Trip.__dict__["__annotations__"] and Leg, work)]
            stop = hints[1]["stop"]
            return [str(sorted(hint)) for hint in hints] + [str(sorted(typing.get_type_hints(stop)))]

        def unused(value: fancy.Frame): ...
        """,
    )
    (travel.project.parent / "site-packages" / "fancy.py").write_text("class Frame: ...")
    assert travel.run("script.py").result == ["['legs']", "['stop', 'way']", "['return']", "['back', 'name']"]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_that_a_task_starts_run_functions_of_the_script(travel: Travel, method: str) -> None:
    written(
        travel,
        f"""
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        import helper

        class Number:
            def __init__(self, value): self.value = helper.double(value)

        def square(number): return Number(number.value ** 2)

        def work():
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context({method!r})) as pool:
                found = list(pool.map(square, [Number(1), Number(2)]))
            assert all(type(number) is Number for number in found)
            return [number.value for number in found]
        """,
    )
    travel.write({"helper.py": "def double(x):\n    return 2 * x\n"})
    assert travel.run("script.py").result == [8, 32]


def test_pickle_names_classes_of_the_script(travel: Travel) -> None:
    written(
        travel,
        """
        import collections, copy, enum, pickle

        Point = collections.namedtuple("Point", "x y")

        class Color(enum.Enum):
            RED = 1

        class Odd(Exception):
            pass

        def key(point): return point.x

        def work():
            values = [Point(1, 2), Color.RED, Color, key, Odd("x")]
            copies = pickle.loads(pickle.dumps(values))
            assert copies[:4] == values[:4] and type(copies[4]) is Odd and copy.copy(values[0]) == values[0]
            import __main__
            return __main__.Color is Color and __main__.work.__name__
        """,
    )
    assert travel.run("script.py").result == "work"


def test_a_script_that_starts_work_when_run_is_not_run_again_by_children_of_a_task(travel: Travel) -> None:
    travel.write(
        {
            "script.py": textwrap.dedent("""
                import multiprocessing, os
                from sender import send
                def name(_): return os.environ.get("STARTED")
                def work():
                    os.environ["STARTED"] = "in a child"
                    with multiprocessing.get_context("spawn").Pool(1) as pool:
                        return pool.map(name, [1])
                send(work)
                if os.environ.get("STARTED"): raise SystemExit("the script was run again")
            """)
        }
    )
    assert travel.run("script.py").result == ["in a child"]


FAILS = """
import functools

def wrapped(function):
    @functools.wraps(function)
    def inner():
        return function()  # in the wrapper
    return inner

class Deep:
    def method(self):
        return (lambda: 1 / 0)()  # in the method

@wrapped
def work():
    return Deep().method()  # in the task
"""


def test_a_traceback_shows_file_line_and_source(travel: Travel) -> None:
    written(travel, FAILS)
    error = travel.run("script.py").error
    for line, text in enumerate(FAILS.splitlines(), start=1):
        if "  # in" in text:
            assert f'File "{travel.project}/script.py", line {line}, in ' in error
            assert f"    {text.strip()}\n" in error


def test_a_traceback_shows_helpers_by_their_names_in_the_project(travel: Travel) -> None:
    written(travel, "from pack.helper import fail as work")
    travel.write({"pack/__init__.py": "", "pack/helper.py": "def fail():\n    raise ValueError('no')\n"})
    error = travel.run("script.py").error
    assert "pack/helper.py\", line 2, in fail\n    raise ValueError('no')\n" in error


@pytest.mark.parametrize("source", ["linecache", "zip"])
def test_a_traceback_shows_source_that_is_in_no_file_of_its_own(travel: Travel, source: str) -> None:
    if source == "zip":
        travel.write({"app/__main__.py": f"{FAILS}\nfrom sender import send\nsend(work)\n"})
        zipapp.create_archive(travel.project / "app", travel.project / "app.pyz")
        error = travel.run("app.pyz").error
    else:
        cell = f"CELL = {FAILS!r}\nimport linecache\n"
        cell += "linecache.cache['<cell 1>'] = (len(CELL), None, CELL.splitlines(keepends=True), '<cell 1>')\n"
        cell += "exec(compile(CELL, '<cell 1>', 'exec'))\nfrom sender import send\nsend(work)\n"
        error = travel.run("-", stdin=cell).error
        assert 'File "<cell 1>", line 16, in work\n' in error
    assert "    return Deep().method()  # in the task\n" in error


def test_the_pickle_of_a_function_is_the_same_each_time(travel: Travel) -> None:
    body = """
        import functools, os, typing
        LIMITS, Name = {"a": 1}, typing.NewType("Name", str)
        @functools.lru_cache
        def cached(x: "Name"): return x in LIMITS
        def work(x: "Name" = "a") -> "os.PathLike": return [cached(y) for y in x]
    """
    written(travel, body)
    pickles = set()
    for _ in range(2):
        assert travel.send("script.py").returncode == 0
        pickles.add(travel.sent())
    assert len(pickles) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_objects_of_the_script_are_equal_in_the_worker(travel: Travel, kind: str) -> None:
    body, expression, expected = KINDS[kind]
    written(travel, f"{textwrap.dedent(body)}\ndef work(): return {expression}\n")
    said = travel.run("script.py")
    assert (said.error, said.result) == ("", expected)


CREATE = "which cannot be pickled; create it inside the function"
UNPICKLABLE = {
    "global": ("lock = threading.Lock()", "lock", f"uses global 'lock' (_thread.lock), {CREATE}"),
    "global of a helper": (
        "lock = threading.Lock()\ndef helper(): return lock",
        "helper()",
        f"uses global 'helper', global 'lock' (_thread.lock), {CREATE}",
    ),
    "part of a global": (
        "class Held:\n    def __init__(self): self.inner = [threading.Lock()]\nheld = {'a': 1, 'b': Held()}",
        "held",
        f"uses global 'held', entry 'b', attribute 'inner', item 0 (_thread.lock), {CREATE}",
    ),
    "attribute of a class": (
        "class Held:\n    lock = threading.Lock()",
        "Held",
        f"uses global 'Held', attribute 'lock' (_thread.lock), {CREATE}",
    ),
    "closure": (
        "def make():\n    lines = (x for x in 'ab')\n    return lambda: next(lines)\ninner = make()",
        "inner()",
        f"uses global 'inner', variable 'lines' of an enclosing function (generator), {CREATE}",
    ),
    "default": (
        "def inner(a, *, lock=threading.Lock()): return lock",
        "inner(1)",
        f"uses global 'inner', the default of 'lock' (_thread.lock), {CREATE}",
    ),
    "partial": (
        "import functools\npart = functools.partial(print, 1, lock=threading.Lock())",
        "part",
        f"uses global 'part', argument 'lock' (_thread.lock), {CREATE}",
    ),
    "method": (
        "class Held:\n    def __init__(self): self.lock = threading.Lock()\n    def use(self): ...\nuse = Held().use",
        "use()",
        f"uses global 'use', its object, attribute 'lock' (_thread.lock), {CREATE}",
    ),
    "a file": (
        "file = open(__file__)\nfile.close()",
        "file",
        f"uses global 'file' (_io.TextIOWrapper), {CREATE}: Cannot pickle closed files",
    ),
}


@pytest.mark.parametrize("case", UNPICKLABLE)
def test_the_error_names_the_variable_that_cannot_be_pickled(travel: Travel, case: str) -> None:
    body, expression, text = UNPICKLABLE[case]
    written(travel, f"import threading\n{body}\ndef work(): return {expression}\n")
    done = travel.send("script.py")
    assert done.stderr.splitlines()[-1] == f"lattice_client.errors.TaskDefinitionError: task 'work' {text}"
