"""The pages name files, folders, headings, settings, flags and commands that exist, and the defaults of settings."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from importlib.metadata import EntryPoint
from pathlib import Path
from pkgutil import resolve_name

import pytest
from click import BadParameter, Command, Context, Group, Option
from click.types import FloatParamType

from lattice_client.cli.main import main
from lattice_server.config import ServerConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")])
# Decisions are about the time when they were made.
PRESENT = [page for page in PAGES if page.parent.name != "decisions"]
# Names of files in back quotes that begin with a folder of the project.
NAMED = re.compile(r"`((?:lattice_(?:client|server|worker)|proto|tests|docs|examples|benchmarks|scripts)/[\w./-]+)`")
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
# A default before its setting in brackets, such as "at most 1 GiB of memory (`chunk_bytes`)".
SETTING = re.compile(r"(?<![\w.])(\d[\d,.]*)(?: (KiB|MiB|GiB|s|days))?(?: [^\d\s();:]+){0,6} \(`([a-z]+_[a-z_]+)`\)")
UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "s": 1, "days": 86_400}
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
# The flags of other programs.
OTHER_FLAGS = {
    "docs/isolation.md": {"--package"},
    "docs/languages.md": {"--http", "--protocol"},
    "docs/security.md": {"--protocol", "--cacert", "--reflect-header"},
    "docs/services.md": {"--bind"},
    "examples/agent_loop/README.md": {"--refuse"},
    "examples/go/README.md": {"--template"},
    "examples/nodejs-worker/README.md": {"--functions", "--give-up"},
    "examples/research_agent/README.md": {"--model", "--refuse"},
}


def _commands(command: Command) -> Iterator[Command]:
    """Yield a command and the commands below it."""
    yield command
    if isinstance(command, Group):
        for name in command.list_commands(Context(command)):
            made = command.get_command(Context(command), name)
            assert made is not None
            yield from _commands(made)


# Commands of other packages are entry points.
ENTRY_POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lattice.commands"]
LOADED = {name: EntryPoint(name, value, "lattice.commands").load() for name, value in ENTRY_POINTS.items()}
OWN = {name: resolve_name(place) for name, (place, _) in main.lazy.items()}
TOP = {**OWN, **LOADED}
COMMANDS = [main, *(command for top in TOP.values() for command in _commands(top))]
OPTIONS = [option for command in COMMANDS for option in command.params if isinstance(option, Option)]
FLAGS = {name for option in OPTIONS for name in option.opts if name.startswith("--")} | {"--help"}


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_files_and_headings_that_exist(page: Path) -> None:
    text = page.read_text()
    missing = [name for name in NAMED.findall(text) if not (ROOT / name).exists()]
    for target, anchor in LINK.findall(text):
        found = (page.parent / target).resolve() if target else page
        if not found.exists() or (anchor and anchor not in _anchors(found)):
            missing.append(f"{target}#{anchor}" if anchor else target)
    assert not missing


@pytest.mark.parametrize("page", PRESENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_settings_with_their_defaults(page: Path) -> None:
    settings = {field.name: field.default for field in fields(ServerConfig)}
    for number, unit, key in SETTING.findall(" ".join(page.read_text().split())):
        assert float(number.replace(",", "")) * UNITS[unit] == settings[key], key


@pytest.mark.parametrize("page", PRESENT, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_flags_that_the_commands_have(page: Path) -> None:
    found = set(FLAG.findall(page.read_text()))
    assert found <= FLAGS | OTHER_FLAGS.get(str(page.relative_to(ROOT)), set())


def test_every_command_and_option_has_a_help_text() -> None:
    assert not [command.name for command in COMMANDS if not command.help]
    assert not [option.opts for option in OPTIONS if not option.help]


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_options_refuse_numbers_that_are_not_finite(text: str) -> None:
    numbers = [option for option in OPTIONS if isinstance(option.type, FloatParamType)]
    assert len(numbers) > 10
    for option in numbers:
        with pytest.raises(BadParameter):
            option.type.convert(text, option, None)


def test_the_page_of_the_command_line_lists_every_command() -> None:
    usage = (ROOT / "docs" / "cli.md").read_text().partition("```")[2].partition("```")[0]
    listed = [line for line in usage.splitlines() if line.startswith("lattice")]
    assert {line.split()[1] for line in listed} == TOP.keys()
    for name, top in TOP.items():
        words = {word for line in listed if line.split()[1] == name for word in re.findall(r"\w+", line)}
        assert {command.name for command in _commands(top)} <= words


def test_python_examples_have_no_undefined_names(tmp_path: Path) -> None:
    for page in PRESENT:
        for number, example in enumerate(
            re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
        ):
            (tmp_path / f"{page.parent.name}_{page.stem}_{number}.py").write_text(example)
    assert len(list(tmp_path.iterdir())) > 20
    command = [str(Path(sys.executable).parent / "ruff"), "check", "--isolated", "--select", "F821", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_the_checks_of_pages_find_the_settings_and_flags_of_the_pages() -> None:
    text = " ".join((ROOT / "docs" / "limits.md").read_text().split())
    assert ("2", "GiB", "retained_artifact_bytes") in SETTING.findall(text)
    assert len(SETTING.findall(text)) > 10
    assert {"--journal", "--max-replicas", "--help"} <= FLAGS
