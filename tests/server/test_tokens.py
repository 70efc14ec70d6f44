"""The tokens file and `lattice token`: accepted entries, and the errors for wrong ones."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from lattice_server import cli
from lattice_server.security import SecurityError
from lattice_server.tokens import Credential, Scope, digest_of, read_tokens
from lattice_server.tokens_cli import token
from tests.server.rpc.tenants import entry, write_tokens

DIGEST = "0" * 64
WHOLE = f"""
[[token]]
subject = "alice"
sha256 = "{DIGEST}"
scopes = ["submit"]
tenant = "search"
expires = 2027-01-31T00:00:00Z
nodes = ["gpu-*", "one"]
"""


def file(folder: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path = folder / "tokens.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


def test_credentials_are_those_of_the_file(tmp_path: Path) -> None:
    assert read_tokens(file(tmp_path, "")) == ()
    (found,) = read_tokens(file(tmp_path, WHOLE))
    expires_s = datetime(2027, 1, 31, tzinfo=UTC).timestamp()
    scopes = frozenset({Scope.SUBMIT, Scope.READ})
    assert found == Credential("alice", DIGEST, scopes, "search", False, ("gpu-*", "one"), expires_s)
    assert [found.may_serve(name) for name in ("gpu-1", "one", "gpu", "one-2", "GPU-1")] == [True, True] + [False] * 3


@pytest.mark.parametrize(
    ("scopes", "implied"),
    [
        (["read"], "read"),
        (["submit"], "read submit"),
        (["worker"], "worker"),
        (["admin"], "admin read submit"),
        (["worker", "read"], "read worker"),
    ],
)
def test_scopes_imply_others(tmp_path: Path, scopes: list[str], implied: str) -> None:
    (found,) = read_tokens(write_tokens(tmp_path / "tokens.toml", entry("x", scopes=scopes, tenant="t")))
    assert sorted(scope.value for scope in found.scopes) == implied.split()
    assert (found.tenant, found.is_any_tenant) == ("t", "admin" in scopes)


def test_the_tenant_may_be_any(tmp_path: Path) -> None:
    (found,) = read_tokens(write_tokens(tmp_path / "tokens.toml", entry("x", scopes=["read"], tenant="*")))
    assert (found.tenant, found.is_any_tenant) == ("", True)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (DIGEST, DIGEST[1:], "token 1: sha256 must be 64"),
        (DIGEST, "F" * 64, "token 1: sha256 must be 64"),
        ('sha256 = "', 'token = "secret"\nsha256 = "', "token 1 has token; known are"),
        ('subject = "alice"', "", "token 1 has no subject"),
        ('"alice"', '""', "subject must have 1 to 128"),
        ('"alice"', '"a\\u0007b"', "subject must have 1 to 128 characters, all of them printable"),
        ('"alice"', f'"{"a" * 129}"', "subject must have"),
        ('"alice"', "7", "subject must have"),
        ('"search"', '"a\\nb"', "tenant must have"),
        ('["submit"]', "[]", "scopes must be a list of read, submit, worker, admin"),
        ('["submit"]', '"submit"', "scopes must be"),
        ('["submit"]', '["root"]', "scopes must be"),
        ('["submit"]', "[{}]", "scopes must be"),
        ("2027-01-31T00:00:00Z", "2027-01-31T00:00:00", "expires must be a time with its offset"),
        ("2027-01-31T00:00:00Z", "30", "expires must be"),
        ('["gpu-*", "one"]', "[]", "nodes must be"),
        ('["gpu-*", "one"]', '"gpu-*"', "nodes must be"),
        ('["gpu-*", "one"]', '[""]', "nodes must have"),
        ("[[token]]", "[token]", "each token stands under"),
        ("[[token]]", "[[tokens]]", "there is no 'tokens'"),
        ("[[token]]", "[[token]", "not TOML"),
        ("alice", "\ud800", "not TOML in UTF-8"),
    ],
)
def test_file_is_refused_when_an_entry_is_malformed(tmp_path: Path, old: str, new: str, text: str) -> None:
    path = file(tmp_path, WHOLE.replace(old, new).encode(errors="surrogatepass"))
    with pytest.raises(SecurityError, match=text) as caught:
        read_tokens(path)
    assert f"--tokens-file {path}" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_file_is_refused_when_a_digest_is_repeated(tmp_path: Path) -> None:
    path = file(tmp_path, WHOLE + WHOLE.replace("alice", "bob"))
    with pytest.raises(SecurityError, match="twice, for alice, bob"):
        read_tokens(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610, 0o777])
def test_a_file_that_others_may_use_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(SecurityError, match=f"its mode is {mode:04o}.*chmod 600"):
        read_tokens(file(tmp_path, WHOLE, mode))
    assert read_tokens(file(tmp_path, WHOLE, 0o400))


def test_mode_of_the_target_is_checked_when_the_file_is_a_link(tmp_path: Path) -> None:
    path = file(tmp_path, WHOLE)
    link = tmp_path / "link"
    link.symlink_to(path)
    assert read_tokens(link)
    path.chmod(0o644)
    with pytest.raises(SecurityError, match="its mode is 0644"):
        read_tokens(link)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_another_users_file_is_refused(tmp_path: Path) -> None:
    path = file(tmp_path, WHOLE)
    os.chown(path, 65534, -1)
    link = tmp_path / "link"
    link.symlink_to(path)
    for name in (path, link):
        with pytest.raises(SecurityError, match="belongs to user 65534"):
            read_tokens(name)


def test_file_is_refused_when_it_is_not_regular(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    for path, text in (
        (tmp_path / "none", "No such file"),
        (pipe, "no regular file"),
        (Path("/dev/zero"), "no regular"),
    ):
        with pytest.raises(SecurityError, match=text):
            read_tokens(path)
    long = file(tmp_path, b"#" * (4 * 1024 * 1024 + 1))
    with pytest.raises(SecurityError, match="longer than"):
        read_tokens(long)


def said(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(token, ["new", *arguments], env=environment)


def test_a_new_token_is_shown_once_and_its_digest_written(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    flags = ["--tenant", "search", "--scope", "submit", "--scope", "worker", "--expires", "30d", "--node", 'gpu-"*']
    first = said("--subject", "alice \\ é", *flags, "--tokens-file", str(path))
    second = said("--subject", "bob", "--scope", "read", LATTICE_TOKENS_FILE=str(path))
    assert (first.exit_code, second.exit_code, first.stderr, second.stderr) == (0, 0, "", "")
    tokens = [result.stdout.removesuffix("\n") for result in (first, second)]
    assert len(set(tokens)) == 2
    assert all(len(made.removeprefix("lattice_")) == 43 for made in tokens), "256 bits in base 64"
    alice, bob = read_tokens(path)
    assert [alice.digest, bob.digest] == [digest_of(made) for made in tokens]
    assert (alice.subject, alice.tenant, alice.nodes) == ("alice \\ é", "search", ('gpu-"*',))
    assert alice.scopes == {Scope.SUBMIT, Scope.READ, Scope.WORKER}
    assert alice.expires_s is not None
    assert abs(alice.expires_s - (datetime.now(UTC) + timedelta(days=30)).timestamp()) < 60
    assert bob == Credential("bob", digest_of(tokens[1]), frozenset({Scope.READ}))
    assert not any(made in path.read_text() for made in tokens)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [found.name for found in tmp_path.iterdir()] == ["tokens.toml"]


def test_entry_is_printed_to_stderr_when_no_file_is_given(tmp_path: Path) -> None:
    made = said("--subject", "alice", "--scope", "admin", "--expires", "2027-01-31T02:00:00+02:00")
    (found,) = read_tokens(file(tmp_path, made.stderr))
    assert found.digest == digest_of(made.stdout.strip())
    assert found.expires_s == datetime(2027, 1, 31, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--subject", "x"], "--scope"),
        (["--scope", "read"], "--subject"),
        (["--subject", "x", "--scope", "root"], "'root' is not one of"),
        (["--subject", "", "--scope", "read"], "--subject must have"),
        (["--subject", "x\ny", "--scope", "read"], "--subject must have"),
        (["--subject", "x", "--scope", "read", "--expires", "soon"], "--expires 'soon'"),
        (["--subject", "x", "--scope", "read", "--expires", "2027-01-31T00:00:00"], "with its offset"),
        (["--subject", "x", "--scope", "read", "--expires", "2026-01-31T00:00:00Z"], "is not in the future"),
        (["--subject", "x", "--scope", "read", "--expires", "0d"], "is not in the future"),
        (["--subject", "x", "--scope", "read", "--tokens-file", "/nowhere/tokens.toml"], "/nowhere/tokens.toml: "),
    ],
)
def test_a_token_that_cannot_be_made_is_refused(flags: list[str], text: str) -> None:
    result = said(*flags)
    assert result.exit_code != 0
    assert text in result.stderr
    assert "lattice_" not in result.stdout


def test_file_is_left_unchanged_when_it_is_wrong(tmp_path: Path) -> None:
    flags = ["--subject", "x", "--scope", "read", "--tokens-file"]
    for text, mode, why in ((WHOLE, 0o644, "its mode is 0644"), ("[[token]]\n", 0o600, "token 1 has no")):
        path = file(tmp_path, text, mode)
        result = said(*flags, str(path))
        assert result.exit_code != 0
        assert why in result.stderr
        assert result.stdout == ""
        assert path.read_text() == text


@pytest.mark.parametrize("way", ["flag", "environment", "config"])
def test_a_server_reads_the_file_it_is_given(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Any] = []
    monkeypatch.setattr(cli, "_serve", served.append)
    monkeypatch.setattr(cli, "MAY_SERVE", True)
    path = file(tmp_path, WHOLE, 0o644)
    config = tmp_path / "server.toml"
    config.write_text(f'tokens_file = "{path}"\n')
    flags = {"flag": ["--tokens-file", str(path)], "config": ["--config", str(config)]}.get(way, [])
    environment = {"LATTICE_TOKENS_FILE": str(path)} if way == "environment" else {}
    start = ["--head", *flags]
    refused = CliRunner().invoke(cli.start, start, env=environment)
    assert refused.exit_code != 0
    assert "its mode is 0644" in refused.stderr
    path.chmod(0o600)
    assert CliRunner().invoke(cli.start, start, env=environment).exit_code == 0
    assert [found.tokens_file for found in served] == [str(path)]
