"""The code sent with a function: its modules, the modules left out with their reasons, and its script's names."""

import pickle
import textwrap
import threading
import zipapp
from pathlib import Path

import pydantic
import pytest

from lattice_client import TaskDefinitionError, task
from lattice_client.code import modules
from lattice_client.code import pickler as client_pickler
from lattice_client.code.bundle import Choice, Found
from lattice_worker.runner.encoding import pickler as runner_pickler
from tests.client.travel import Travel

pytestmark = pytest.mark.slow

HELPER = "def double(x):\n    return 2 * x\n"
WORK = """
from sender import send
from helper import double

def work(x):
    return double(x)

send(work, x=4)
"""


@pytest.fixture
def travel(tmp_path: Path) -> Travel:
    """A project and a machine that does not have it."""
    return Travel(tmp_path)


def test_bundle_has_the_modules_beside_the_script(travel: Travel) -> None:
    travel.write({"script.py": WORK, "helper.py": HELPER})
    said = travel.run("script.py")
    assert (said.result, said.files) == (8, ["helper.py"])


def test_bundle_has_the_modules_beside_the_script_when_it_is_started_elsewhere(travel: Travel) -> None:
    travel.write({"bin/script.py": WORK, "bin/helper.py": HELPER, "helper.py": "double = None"})
    assert travel.run("bin/script.py").result == 8


@pytest.mark.parametrize(
    "line", ["from .helper import double", "from pack.helper import double", "from . import helper"]
)
def test_a_module_run_by_name_brings_its_package(travel: Travel, line: str) -> None:
    script = WORK.replace("from helper import double", line)
    if line.endswith("import helper"):
        script = script.replace("double(x)", "helper.double(x)")
    travel.write({"pack/__init__.py": "", "pack/main.py": script, "pack/helper.py": HELPER})
    said = travel.run("-m", "pack.main")
    assert (said.result, said.files) == (8, ["pack/__init__.py", "pack/helper.py", "pack/main.py"])


def test_a_relative_import_inside_a_function_works_elsewhere(travel: Travel) -> None:
    script = """
        from sender import send
        def work(x):
            from .helper import double
            return double(x)
        send(work, x=4)
    """
    travel.write({"pack/__init__.py": "", "pack/__main__.py": textwrap.dedent(script), "pack/helper.py": HELPER})
    assert travel.run("-m", "pack").result == 8


@pytest.mark.parametrize("place", ["top", "inside", "literal"])
def test_code_from_standard_input_brings_the_modules_of_the_working_directory(travel: Travel, place: str) -> None:
    inside = {
        "top": "",
        "inside": "    from helper import double\n",
        "literal": "    import importlib\n    double = importlib.import_module('helper').double\n",
    }[place]
    top = "from helper import double\n" if place == "top" else ""
    script = f"from sender import send\n{top}\ndef work(x):\n{inside}    return double(x)\n\nsend(work, x=4)\n"
    travel.write({"helper.py": HELPER})
    said = travel.run("-", stdin=script)
    assert (said.result, said.files) == (8, ["helper.py"])


def test_packages_elsewhere_on_the_path_travel(travel: Travel) -> None:
    travel.write(
        {
            "app/script.py": WORK,
            "src/helper/__init__.py": "from helper.deep.inner import double",
            "lib/base.py": "TWO = 2",
        }
    )
    travel.write(
        {
            "src/helper/deep/__init__.py": "",
            "src/helper/deep/inner.py": "import base\ndef double(x): return x * base.TWO\n",
        }
    )
    said = travel.run("app/script.py", path=["src", "lib"])
    assert (said.result, said.files) == (
        8,
        ["base.py", "helper/__init__.py", "helper/deep/__init__.py", "helper/deep/inner.py"],
    )


def test_an_editable_installation_travels(travel: Travel) -> None:
    finder = """
        import sys
        from importlib.machinery import PathFinder
        class Finder:
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                return PathFinder.find_spec(name, [PLACE]) if name == "helper" else None
        sys.meta_path.append(Finder)
    """
    place = travel.project / "elsewhere"
    travel.write({"script.py": "import finder\n" + WORK, "elsewhere/helper.py": HELPER})
    (travel.project.parent / "site-packages" / "finder.py").write_text(
        textwrap.dedent(finder).replace("PLACE", repr(str(place)))
    )
    assert travel.run("script.py").result == 8


def test_namespace_packages_travel(travel: Travel) -> None:
    script = WORK.replace("from helper", "from agents.tools.helper")
    travel.write({"script.py": script, "agents/tools/helper.py": HELPER, "agents/other.py": "", "data/notes.txt": ""})
    said = travel.run("script.py")
    assert (said.result, said.files) == (8, ["agents/other.py", "agents/tools/helper.py"])


def test_parts_of_a_namespace_package_travel_from_all_places(travel: Travel) -> None:
    script = WORK.replace("from helper", "from ours.one.helper")
    travel.write({"script.py": script, "a/ours/one/helper.py": "from ours.two import double", "b/ours/two.py": HELPER})
    said = travel.run("script.py", path=["a", "b"])
    assert (said.result, said.files) == (8, ["ours/one/helper.py", "ours/two.py"])


@pytest.mark.parametrize("package", [False, True])
def test_a_zip_application_brings_its_modules(travel: Travel, package: bool) -> None:
    line = "from pack.helper" if package else "from helper"
    travel.write({"app/__main__.py": WORK.replace("from helper", line), "app/pack/__init__.py": ""})
    travel.write({"app/pack/helper.py" if package else "app/helper.py": HELPER, "app/pack/text.txt": "text"})
    zipapp.create_archive(travel.project / "app", travel.project / "app.pyz")
    said = travel.run("app.pyz")
    expected = ["pack/__init__.py", "pack/helper.py", "pack/text.txt"] if package else ["helper.py"]
    assert (said.result, said.files) == (8, expected)


def test_an_archive_on_the_path_travels(travel: Travel) -> None:
    travel.write({"script.py": WORK, "parts/helper.py": HELPER, "parts/__main__.py": ""})
    zipapp.create_archive(travel.project / "parts", travel.project / "parts.zip")
    assert travel.run("script.py", path=["parts.zip"]).result == 8


CALLABLES = {
    "partial": "functools.partial(helper.scale, by=2)",
    "partial of a partial": "functools.partial(functools.partial(helper.scale), by=2)",
    "instance": "helper.Scale(2)",
    "method": "helper.Scale(2).scaled",
    "class method": "helper.Scale.doubled",
    "own partial": "functools.partial(own, scale=helper.Scale(2))",
    "own instance": "Own(2)",
    "own method": "Own(2).call",
}


@pytest.mark.parametrize("kind", CALLABLES)
def test_bundle_has_the_module_of_the_wrapped_function_when_the_task_is_a_callable(travel: Travel, kind: str) -> None:
    helper = """
        def scale(x, by): return x * by
        class Scale:
            def __init__(self, by): self.by = by
            def __call__(self, x): return x * self.by
            def scaled(self, x): return x * self.by
            @classmethod
            def doubled(cls, x): return cls(2)(x)
    """
    script = f"""
        import functools
        from sender import send
        import helper
        def own(x, scale): return scale(x)
        class Own(helper.Scale):
            def call(self, x): return self(x)
        send({CALLABLES[kind]}, x=4)
    """
    travel.write({"script.py": textwrap.dedent(script), "helper.py": textwrap.dedent(helper)})
    assert travel.run("script.py").result == 8


def test_data_files_of_a_package_travel_without_caches(travel: Travel) -> None:
    helper = """
        from pathlib import Path
        TEXT = Path(__file__).parent / "prompts" / "system.txt"
        def double(x): return TEXT.read_text()
    """
    travel.write(
        {
            "script.py": WORK.replace("helper", "pack"),
            "pack/__init__.py": textwrap.dedent(helper),
            "pack/prompts/system.txt": "be brief",
        }
    )
    unwanted = [
        "__pycache__/x.pyc",
        ".git/config",
        "node_modules/a.js",
        ".env",
        ".venv/lib.py",
        "env/pyvenv.cfg",
        "env/lib.py",
    ]
    travel.write({f"pack/{name}": "unwanted" for name in unwanted})
    said = travel.run("script.py")
    assert (said.result, said.files) == ("be brief", ["pack/__init__.py", "pack/prompts/system.txt"])


@pytest.mark.parametrize("name", ["secrets", "statistics", "queue", "wave"])
def test_a_module_that_shadows_the_standard_library_is_preferred(travel: Travel, name: str) -> None:
    travel.write({"script.py": WORK.replace("helper", name), f"{name}.py": HELPER})
    said = travel.run("script.py")
    assert (said.result, said.files) == (8, [f"{name}.py"])


def test_a_spawned_child_of_the_client_sends_functions_of_the_script(travel: Travel) -> None:
    script = """
        import multiprocessing
        from sender import send
        from helper import double

        def work(x):
            return double(x) + own(x)

        def own(x):
            return x

        def child():
            send(work, x=4)

        if __name__ == "__main__":
            process = multiprocessing.get_context("spawn").Process(target=child)
            process.start()
            process.join()
    """
    travel.write({"script.py": textwrap.dedent(script), "helper.py": HELPER})
    assert travel.run("script.py").result == 12


def test_an_input_of_a_class_that_only_the_script_imports_is_read(travel: Travel) -> None:
    travel.write(
        {
            "script.py": "import sender, tasks, models\nsender.send(tasks.work, query=models.Query())\n",
            "tasks.py": "def work(query):\n    return query.text\n",
            "models.py": "class Query:\n    text = 'q'\n",
        }
    )
    assert travel.run("script.py").result == "q"


OPTIONS = """
from sender import send
from lattice_client import task

@task({options})
def work(x):
    import importlib
    return importlib.import_module(NAME).double(x)

NAME = "helper"
send(work, x=4)
"""


@pytest.mark.parametrize("options", ["modules=['helper']", "modules=['helper.py']", "modules=['lib/helper.py']"])
def test_bundle_has_named_modules_when_the_import_is_dynamic(travel: Travel, options: str) -> None:
    travel.write({"script.py": OPTIONS.format(options=options), "helper.py": HELPER, "lib/helper.py": HELPER})
    said = travel.run("script.py", path=["lib"])
    assert (said.result, said.files) == (8, ["helper.py"])


def test_modules_adds_files_and_folders_beside_the_script(travel: Travel) -> None:
    script = """
        from pathlib import Path
        from sender import send
        from lattice_client import task

        @task(modules=["prompts", "settings.toml"], exclude=["*.bin"])
        def work():
            here = Path(__file__).parent
            return (here / "settings.toml").read_text() + (here / "prompts" / "a" / "one.txt").read_text()

        send(work)
    """
    travel.write({"app/script.py": textwrap.dedent(script), "app/prompts/a/one.txt": "1", "app/prompts/b.bin": "2"})
    travel.write({"app/settings.toml": "0"})
    said = travel.run("app/script.py")
    assert (said.result, said.files) == ("01", ["prompts/a/one.txt", "settings.toml"])


def test_bundle_has_installed_modules_when_they_are_named(travel: Travel) -> None:
    script = """
        from sender import send
        from lattice_client import task

        @task(modules=["iniconfig"])
        def work():
            import iniconfig
            return iniconfig.__file__

        send(work)
    """
    travel.write({"script.py": textwrap.dedent(script)})
    said = travel.run("script.py")
    assert "iniconfig/__init__.py" in said.files
    assert str(said.result).endswith("/bundle/iniconfig/__init__.py")


def test_modules_that_do_not_exist_are_refused(travel: Travel) -> None:
    travel.write({"script.py": OPTIONS.format(options="modules=['nothing.txt']")})
    done = travel.send("script.py")
    assert (
        f"modules=['nothing.txt']: there is no module of that name, and no file or folder in {travel.project}"
        in done.stderr
    )


UNSEEN = "was not among the imports that the client found; name it in modules=[...] of the task"
INSTALLED = "is installed on the client, so it is expected on the worker; install it there"
LEFT_OUT = {
    "unseen": (OPTIONS.format(options=""), f"module 'helper' {UNSEEN}"),
    "installed": (WORK.replace("helper", "fancy"), f"module 'fancy' {INSTALLED}"),
    "installed, inside": (
        OPTIONS.format(options="").replace("import_module(NAME)", "import_module('fancy')"),
        f"module 'fancy' {INSTALLED}",
    ),
    "installed, of a helper": (WORK.replace("helper", "other"), f"module 'fancy' {INSTALLED}"),
    "excluded": (
        WORK.replace("send(work", "send(task(exclude=['helper'])(work)"),
        "module 'helper' is left out by exclude=['helper']",
    ),
    "excluded, inside": (
        WORK.replace("from helper", "from pack.deep.helper").replace(
            "send(work", "send(task(exclude=['pack.d*'])(work)"
        ),
        "module 'pack.deep' is left out by exclude=['pack.d*']",
    ),
    "large": (
        WORK.replace("helper", "large"),
        "module 'large' has 40.0 MiB, above the limit of 32 MiB; install it on the worker",
    ),
    "data": (
        WORK.replace("helper", "pack.data"),
        "file 'pack/large.bin' has 5.0 MiB, above the limit of 4 MiB; name it in modules=[...]",
    ),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_the_error_says_why_a_module_was_not_sent(travel: Travel, case: str) -> None:
    script, text = LEFT_OUT[case]
    travel.write({"script.py": "from lattice_client import task\n" + script, "helper.py": HELPER})
    travel.write(
        {"other.py": "def double(x):\n    import fancy\n", "pack/__init__.py": "", "pack/deep/__init__.py": ""}
    )
    travel.write({"pack/deep/helper.py": HELPER, "pack/data.py": DATA, "pack/large.bin": bytes(5 << 20)})
    travel.write({"large/__init__.py": HELPER, **{f"large/{n}.bin": bytes(4 << 20) for n in range(10)}})
    (travel.project.parent / "site-packages" / "fancy.py").write_text(HELPER)
    assert text in travel.run("script.py").error


@pytest.mark.parametrize("exclude", ["pack.many", "pack/many", "pack/m*"])
@pytest.mark.parametrize("is_zipped", [False, True])
def test_folders_that_are_excluded_are_not_looked_at(tmp_path: Path, exclude: str, is_zipped: bool) -> None:
    root = tmp_path / "app"
    for number in range(30):
        (root / "pack" / "many" / f"d{number % 3}").mkdir(parents=True, exist_ok=True)
        (root / "pack" / "many" / f"d{number % 3}" / f"{number}.py").write_text("")
    (root / "pack" / "__init__.py").write_text(HELPER)
    if is_zipped:
        zipapp.create_archive(root, tmp_path / "app.zip", main="pack:double")
        root = tmp_path / "app.zip"
    found = Found(Choice(exclude=[exclude]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules, "MAX_FILES", 2)
        files = dict(modules.tree(str(root / "pack"), "pack", found.excludes))
    assert list(files) == ["__init__.py"]
    assert found.left_out == {"pack.many": f"is left out by exclude=[{exclude!r}]"}


def test_module_that_is_excluded_is_not_looked_at(travel: Travel) -> None:
    script = """
        from sender import send
        from lattice_client import task
        from lattice_client.code import modules

        modules.MAX_FILES = 2

        @task(exclude=["many"])
        def work():
            import many

        send(work)
    """
    travel.write({"script.py": textwrap.dedent(script), **{f"many/{number}.py": "" for number in range(10)}})
    assert "module 'many' is left out by exclude=['many']" in travel.run("script.py").error


DATA = "from pathlib import Path\ndef double(x):\n    return (Path(__file__).parent / 'large.bin').read_bytes()\n"


def test_more_than_32_mib_are_refused_with_the_largest_names(travel: Travel) -> None:
    travel.write({"script.py": OPTIONS.format(options="modules=['a.bin', 'b.bin', 'helper']"), "helper.py": HELPER})
    travel.write({"a.bin": bytes(20 << 20), "b.bin": bytes(21 << 20)})
    done = travel.send("script.py")
    assert "the limit is 33554432; the largest: b.bin, a.bin, helper.py; leave unused files out" in done.stderr


@pytest.mark.parametrize("setting", ["modules", "exclude"])
def test_task_raises_when_a_list_option_is_a_text(setting: str) -> None:
    with pytest.raises(TaskDefinitionError, match=f"task 'work': {setting} must be a list, not 'helper'"):
        task(name="work", **{setting: "helper"})(len)


def test_the_client_and_the_runner_pickle_alike() -> None:
    client, runner = (Path(str(found.__file__)).read_text() for found in (client_pickler, runner_pickler))
    assert client == runner


def test_a_pydantic_model_is_sent_without_the_variables_of_its_function() -> None:
    lock = threading.Lock()

    class Inner(pydantic.BaseModel):
        number: int

    class Outer(Inner):
        inner: Inner

        def total(self) -> int:
            return self.number + self.inner.number

    with lock:
        found = pickle.loads(client_pickler.dumps(Outer(number=1, inner=Inner(number=2))))
    assert found.total() == 3
    assert type(found) is Outer
    # The class here keeps them.
    assert "lock" in vars(Outer)["__pydantic_parent_namespace__"]
