"""Flags and files of tokens and TLS: accepted values, and the errors for wrong ones."""

import logging
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from lattice_server import app, cli, security
from lattice_server.config import ServerConfig, ServerTls
from lattice_server.configfile import ConfigError, read_config
from tests.certificates import Certificates, certificates

TLS = ServerTls(b"certificate", b"key")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates of two authorities."""
    return certificates(tmp_path_factory.mktemp("certificates"))


def file(folder: Path, content: bytes) -> Path:
    (folder / "token").write_bytes(content)
    return folder / "token"


@pytest.mark.parametrize("content", [b"se-cret", b"se-cret\n", b"se-cret\r\n"])
def test_a_token_is_the_line_of_its_file(tmp_path: Path, content: bytes) -> None:
    assert security.read_token(file(tmp_path, content), {}) == "se-cret"


@pytest.mark.parametrize(
    "content", [b"", b"\n", b" ", b"two\nlines", b"two words", b"x\n\n", "é".encode(), b"\xff", b"x" * 4097]
)
def test_token_is_refused_unshown_when_it_is_malformed(tmp_path: Path, content: bytes) -> None:
    path = file(tmp_path, content)
    with pytest.raises(security.SecurityError, match="--token-file") as caught:
        security.read_token(path, {"LATTICE_TOKEN": "other"})
    assert "two" not in str(caught.value)


def test_a_token_may_come_from_the_environment(tmp_path: Path) -> None:
    assert security.read_token(None, {}) is None
    assert security.read_token(None, {"LATTICE_TOKEN": "se-cret"}) == "se-cret"
    assert security.read_token(file(tmp_path, b"filed"), {"LATTICE_TOKEN": "se-cret"}) == "filed"
    for wrong in ("", "two words", "line\n"):
        with pytest.raises(security.SecurityError, match="LATTICE_TOKEN"):
            security.read_token(None, {"LATTICE_TOKEN": wrong})


def test_certificates_are_read_when_they_match_their_key(made: Certificates) -> None:
    assert security.read_tls(None, None, None) is None
    tls = security.read_tls(made.cert, made.key, made.ca)
    assert tls == ServerTls(made.cert.read_bytes(), made.key.read_bytes(), made.ca.read_bytes())
    plain = security.read_tls(made.cert, made.key, None)
    assert plain is not None
    assert plain.client_ca is None


def test_tls_file_is_refused_by_its_flag_when_it_does_not_match(made: Certificates, tmp_path: Path) -> None:
    empty = file(tmp_path, b"")
    locked = tmp_path / "locked.pem"
    command = ["openssl", "pkey", "-in", str(made.key), "-aes256", "-passout", "pass:x", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    for cert, key, ca, flags in (
        (made.cert, None, None, "--tls-cert needs --tls-key"),
        (None, made.key, None, "--tls-key needs --tls-cert"),
        (None, None, made.ca, "--tls-ca .* needs --tls-cert and --tls-key"),
        (made.cert, made.caller_key, None, "--tls-cert .*key values mismatch"),
        (made.cert, locked, None, "--tls-key .*unencrypted"),
        (empty, made.key, None, "--tls-cert"),
        (tmp_path / "ghost", made.key, None, "--tls-cert .*No such file"),
        (made.cert, made.key, empty, "--tls-ca"),
        (made.cert, made.key, made.key, "--tls-ca"),
    ):
        with pytest.raises(security.SecurityError, match=flags):
            security.read_tls(cert, key, ca)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "localhost", "::1"])
def test_loopback_needs_nothing(host: str) -> None:
    assert security.check_exposure(host, None, None, is_allowed=False) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org", "localhost.example.org", "", "127.1"])
def test_any_other_address_needs_both(host: str) -> None:
    assert security.check_exposure(host, TLS, True, is_allowed=False) is None
    for tls, token, missing in (
        (None, False, "without TLS and a token .*--tls-cert and --tls-key, and --tokens-file"),
        (TLS, False, "without a token .*give --tokens-file, --token-file or LATTICE_TOKEN, or --insecure"),
        (None, True, "without TLS .*give --tls-cert and --tls-key, or --insecure"),
    ):
        with pytest.raises(security.SecurityError, match=missing):
            security.check_exposure(host, tls, token, is_allowed=False)
        warning = security.check_exposure(host, tls, token, is_allowed=True)
        assert warning is not None
        assert "se-cret" not in warning


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--host", "0.0.0.0"], "serving on 0.0.0.0 without TLS and a token"),
        (["--tls-cert", "CERT"], "--tls-cert needs --tls-key"),
        (["--token-file", "EMPTY"], "it is empty"),
        (["--tls-key", "ghost"], "'--tls-key': File 'ghost' does not exist"),
        (["--port", "99999"], "'--port': 99999 is not in the range 0<=x<=65535"),
    ],
)
def test_command_names_the_flag_when_it_is_wrong(
    made: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], text: str
) -> None:
    monkeypatch.setattr(cli, "MAY_SERVE", True)
    paths = {"CERT": str(made.cert), "EMPTY": str(file(tmp_path, b""))}
    flags = [paths.get(flag, flag) for flag in flags]
    done = CliRunner().invoke(cli.start, ["--head", *flags])
    assert done.exit_code == 2
    assert text in " ".join(done.stderr.replace("│", " ").split())


def test_command_serves_when_the_address_is_secured_or_insecure_is_set(
    made: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served: list[ServerConfig] = []

    async def serve(config: ServerConfig, announce: object) -> None:
        served.append(config)

    monkeypatch.setattr(app, "serve", serve)
    monkeypatch.setattr(cli, "MAY_SERVE", True)
    for name in ("GRPC_ENABLE_FORK_SUPPORT", "GRPC_VERBOSITY"):  # The command sets them.
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("LATTICE_TOKEN", raising=False)
    safe = ["--tls-cert", str(made.cert), "--tls-key", str(made.key), "--tls-ca", str(made.ca)]
    with caplog.at_level(logging.WARNING):
        for flags in (["--host", "0.0.0.0", *safe], ["--insecure"]):
            assert CliRunner(env={"LATTICE_TOKEN": "se-cret"}).invoke(cli.start, ["--head", *flags]).exit_code == 0
        assert not caplog.records
        assert CliRunner().invoke(cli.start, ["--head", "--host", "0.0.0.0", "--insecure"]).exit_code == 0
    assert [(config.host, config.token) for config in served] == [
        ("0.0.0.0", "se-cret"),
        ("127.0.0.1", "se-cret"),
        ("0.0.0.0", None),
    ]
    assert served[0].tls is not None
    assert served[0].tls.client_ca == made.ca.read_bytes()
    assert "serving on 0.0.0.0 without TLS and a token" in caplog.text
    for config in served:
        assert "se-cret" not in repr(config)
        assert "PRIVATE" not in repr(config)


def test_secrets_are_no_settings_of_the_configuration_file() -> None:
    for text in ('token = "se-cret"', 'tls = "x"'):
        with pytest.raises(ConfigError, match="no setting"):
            read_config(text)
