"""The configuration file: its values, and the errors for a wrong one."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from lattice_server.cli import _default_journal
from lattice_server.config import ServerConfig
from lattice_server.configfile import ConfigError, read_config
from lattice_server.core.scheduling.batching import BatchRule, NameMatch
from lattice_server.flags import Flags
from tests.commands import LATTICE, START
from tests.ports import free_port

pytestmark = pytest.mark.slow

RULE = '[[batch]]\nmatch = "prefix"\npattern = "embed"\nmax_size = 32\nmax_wait_s = 0.05\n'


def test_configuration_has_its_defaults_when_the_file_is_empty() -> None:
    assert read_config("") == ServerConfig()


def test_configuration_has_the_values_of_the_file() -> None:
    text = f'max_open_tasks = 5\nsession_ttl_s = 7\nstop_grace_s = 0.5\n[limits]\nopenai = 8\n"my api" = 1\n{RULE}'
    expected = ServerConfig(
        max_open_tasks=5,
        session_ttl_s=7,
        stop_grace_s=0.5,
        limits={"openai": 8, "my api": 1},
        batch_rules=(BatchRule(NameMatch.PREFIX, "embed", 32, 0.05),),
    )
    assert read_config(text) == expected


def test_environment_overrides_the_file() -> None:
    environment = {"LATTICE_MAX_OPEN_TASKS": "7", "LATTICE_STORE_FOLDER": "/values", "LATTICE_TARGET": "host:1"}
    found = read_config("max_open_tasks = 5\nmax_workflows = 3", environment)
    assert found == ServerConfig(max_open_tasks=7, max_workflows=3, store_folder="/values")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("MAX_OPEN_TASKS", "many", "LATTICE_MAX_OPEN_TASKS must be a whole number from 0, not 'many'"),
        ("MAX_OPEN_TASKS", "-1", "LATTICE_MAX_OPEN_TASKS must be a whole number from 0, not -1"),
        ("SESSION_TTL_S", "nan", "LATTICE_SESSION_TTL_S must be a number from 0, not nan"),
        ("TENANT_SHARE", "2", "LATTICE_TENANT_SHARE must be above 0 and at most 1, not 2.0"),
        ("LOG_FORMAT", "xml", "LATTICE_LOG_FORMAT must be one of text, json, not 'xml'"),
    ],
)
def test_variable_is_refused_by_name_when_its_value_is_wrong(name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config("", {f"LATTICE_{name}": text})


def test_batching_rules_have_the_order_of_the_file() -> None:
    text = RULE.replace("prefix", "regex").replace("embed", "embed-[0-9]+") + RULE.replace("prefix", "exact") + RULE
    assert [rule.match for rule in read_config(text).batch_rules] == [
        NameMatch.REGEX,
        NameMatch.EXACT,
        NameMatch.PREFIX,
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_open_tasks =", "Invalid value"),
        ("max_open_task = 5", "there is no setting 'max_open_task'; there are limits, batch, .*max_open_tasks"),
        ("port = 5", "there is no setting 'port'"),
        ("labels = {a = 'b'}", "there is no setting 'labels'"),
        ("max_open_tasks = '5'", "max_open_tasks must be a whole number from 0, not '5'"),
        ("max_open_tasks = true", "max_open_tasks must be a whole number from 0, not True"),
        ("max_open_tasks = -1", "max_open_tasks must be a whole number from 0, not -1"),
        ("max_open_tasks = 1.5", "max_open_tasks must be a whole number from 0"),
        ("session_ttl_s = 'long'", "session_ttl_s must be a number from 0"),
        ("session_ttl_s = nan", "session_ttl_s must be a number from 0, not nan"),
        ("limits = 3", "limits must be a table of numbers by name"),
        ("[limits]\nopenai = 0", "limits.openai must be a whole number from 1, not 0"),
        ("[limits]\nopenai = 1.5", "limits.openai must be a whole number from 1, not 1.5"),
        ("[limits.openai]\nmax = 1", "limits.openai must be a whole number from 1"),
        ("batch = 3", "batch must be a list of tables"),
        ("[batch]\nmatch = 'exact'", "batch must be a list of tables"),
        ("batch = ['embed']", "batch must be a list of tables"),
        (RULE.replace("max_wait_s = 0.05", ""), r"batch\[0\] must have .*; look at max_wait_s"),
        (RULE + "scope = 'run'", r"batch\[0\] must have .*; look at scope"),
        (RULE + RULE.replace("prefix", "suffix"), r"batch\[1\].match must be one of exact, prefix, regex"),
        (RULE.replace('"prefix"', "[1]"), r"batch\[0\].match must be one of exact, prefix, regex"),
        (RULE.replace('"embed"', "3"), r"batch\[0\].pattern must be a text"),
        (RULE.replace("prefix", "regex").replace("embed", "("), r"batch\[0\].pattern is no regular expression"),
        ("log_format = 'xml'", "log_format must be one of text, json, not 'xml'"),
        ("log_level = 'loud'", "log_level must be one of debug, info, warning, error, not 'loud'"),
        ("ray_address = 'a:1'", "there is no setting 'ray_address'"),
        ("gateway_port = 65536", "gateway_port must be at most 65535, not 65536"),
        ("chunk_limit_bytes = 1048577", "chunk_limit_bytes must be at most 1048576"),
        ("session_ttl_s = 0", "session_ttl_s must be above 0"),
        ("tenant_share = 0", "tenant_share must be above 0 and at most 1, not 0"),
        ("tenant_share = 1.5", "tenant_share must be above 0 and at most 1, not 1.5"),
        ("inline_limit_bytes = 4095", "inline_limit_bytes must be from 4096"),
        (RULE.replace("32", "0"), r"batch\[0\].max_size must be a whole number from 1, not 0"),
        (RULE.replace("32", "1.5"), r"batch\[0\].max_size must be a whole number from 1, not 1.5"),
        (RULE.replace("0.05", "-1"), r"batch\[0\].max_wait_s must be a number from 0, not -1"),
        (RULE.replace("0.05", "inf"), r"batch\[0\].max_wait_s must be a number from 0, not inf"),
    ],
)
def test_file_is_refused_by_key_when_a_value_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.toml", b"max_open_task = 5", r"bad\.toml: there is no setting 'max_open_task'"),
        ("bytes.toml", b"\xff\xfe", r"bytes\.toml: .*not UTF-8"),
        ("missing.toml", None, r"missing\.toml' does not exist"),
    ],
)
def test_a_server_does_not_start_with_a_wrong_file(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    command = [*START, "--head", "--port", "0", "--executor", "local", "--config", str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert re.search(message, done.stderr)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--label", "zone"], "a label is NAME=VALUE, not 'zone'"),
        (["--num-gpus", "-1"], "--num-gpus"),
        (["--num-cpus", "-1"], "--num-cpus"),
        (["--memory", "-5"], "--memory"),
        (["--gpu-memory", "-5"], "--gpu-memory"),
    ],
)
def test_a_server_does_not_start_with_wrong_flags(flags: list[str], message: str) -> None:
    command = [*START, "--head", "--port", "0", "--executor", "local", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert message in done.stderr


def test_the_pages_name_the_defaults_of_the_configuration() -> None:
    found, docs = ServerConfig(), Path(__file__).parent.parent.parent / "docs"
    names = ("limits.md", "cluster.md", "services.md")
    pages = " ".join(" ".join((docs / name).read_text() for name in names).split())
    for claim in (
        f"no longer than {found.result_ttl_s:,.0f} s (`result_ttl_s`)",
        f"the newest: {found.retained_runs:,} (`retained_runs`)",
        f"at most {found.retained_bytes // 2**30} GiB of memory (`retained_bytes`)",
        f"kept to {found.retained_artifact_bytes // 2**30} GiB in all (`retained_artifact_bytes`)",
        f"stored workflows, {found.code_bytes // 2**20} MiB (`code_bytes`)",
        f"{found.upload_bytes // 2**30} GiB (`upload_bytes`)",
        f"stored workflows, {found.workflow_bytes // 2**30} GiB (`workflow_bytes`)",
        f"at most {found.live_run_bytes // 2**30} GiB of memory (`live_run_bytes`)",
        f"in parts {found.draft_bytes // 2**30} GiB (`draft_bytes`)",
        f"waits for {found.upload_ttl_s:.0f} s (`upload_ttl_s`)",
        f"(`tenant_share`, {found.tenant_share})",
        f"Up to {found.max_workflows:,} workflows are stored (`max_workflows`)",
        f"in `session_ttl_s` ({found.session_ttl_s:g} s)",
        f"A value over {found.inline_limit_bytes // 1024} KiB stays on the node that made it",
        f"stopped {found.shrink_delay_s:g} s after they are no longer needed (`shrink_delay_s`",
        f"can return, {found.worker_message_limit_bytes // 2**20} MiB of it in all",
    ):
        assert claim in pages, f"no longer said, or no longer so: {claim}"


@pytest.mark.parametrize(("flag", "key", "expected"), [(7443, 7000, "7443"), (None, 7000, "7000"), (None, 0, None)])
def test_workers_of_the_server_find_the_port_of_their_gateways(
    flag: int | None, key: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {})
    flags = Flags(**dict.fromkeys(Flags.__dataclass_fields__) | {"gateway_port": flag})
    assert flags.gateways(ServerConfig(gateway_port=key)).gateway_port == int(expected or 0)
    assert os.environ.get("LATTICE_GATEWAY_PORT") == expected


@pytest.mark.parametrize(
    "named", ["sqlite:/var/journal", "sqlite:///var/journal", "mysql://a/b", "postgresql:/a", "file:///a", "memory:"]
)
def test_journal_that_is_named_by_another_url_is_refused(named: str, tmp_path: Path) -> None:
    command = [*START, "--head", "--executor", "local", "--port", "0", "--journal", named]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100, check=False)
    assert (done.returncode, os.listdir(tmp_path)) == (2, [])
    scheme = named.partition(":")[0]
    assert f"a URL postgresql://..., or `memory`, and nothing that begins with '{scheme}:'; " in done.stderr


@pytest.mark.parametrize(
    ("port", "environment", "expected"),
    [
        (0, {"HOME": "/home/ann"}, "memory"),
        (50051, {"HOME": "/home/ann"}, "/home/ann/.local/share/lattice/journal-50051"),
        (50052, {"HOME": "/home/ann", "XDG_DATA_HOME": "/data"}, "/data/lattice/journal-50052"),
    ],
)
def test_journal_is_by_default_in_a_folder_of_the_port(
    port: int, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", environment)
    assert _default_journal(port) == expected


def test_journal_by_default_needs_a_folder_that_can_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run(
        [*START, "--head", "--executor", "local", "--port", str(free_port())],
        env={**os.environ, "XDG_DATA_HOME": str(tmp_path / "file")},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.endswith("Not a directory; name another folder with --journal, or `memory`\n")


@pytest.mark.parametrize(
    "command", [["start", "--head", "--executor", "local", "--port", "0", "--journal"], ["journal", "check"]]
)
def test_journal_in_postgresql_without_its_driver_names_the_packages(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "psycopg.py").write_text("raise ImportError('no libpq')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [LATTICE, *command, "postgresql://user@127.0.0.1:1/x"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        'Error: a journal in PostgreSQL needs more packages: pip install "lattice-control-plane[postgres]" (no libpq)'
    )
